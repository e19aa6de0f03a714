"""Doctor, tests, kernels, a model and its decode on this GPU, a step after the other; `--help` prints the keys."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_star.benchmarking.gpu_check.run import run
from nemo_star.config.compose import compose
from nemo_star.config.gpu_check import GpuCheckConfig


def main(arguments: Sequence[str]) -> int:
    """Exit code 0: all steps are done; 1: one is not; 130: interrupted. Raises ValueError for a user's error."""
    config = compose(GpuCheckConfig, arguments, tool="gpu_check", literal_keys=("output",))
    return 0 if config is None else run(config)
