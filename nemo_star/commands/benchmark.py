"""Compare attention methods on random weights: prefill, decode, memory; `--help` prints the keys."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_star.config.benchmark import BenchmarkConfig
from nemo_star.config.compose import compose
from nemo_star.runtime.importing import no_garbage_collection
from nemo_star.runtime.transformer_engine import prepare_imports


def main(arguments: Sequence[str]) -> int:
    """Exit code 0. Raises ValueError for a user's error."""
    config = compose(BenchmarkConfig, arguments, tool="benchmark", literal_keys=("output", "plot"))
    if config is None:
        return 0
    with no_garbage_collection():
        prepare_imports()
        from nemo_star.benchmarking.run import run  # only now: importing Megatron takes seconds

    return run(config)
