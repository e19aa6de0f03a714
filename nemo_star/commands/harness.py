"""Tasks of lm-evaluation-harness, answered by a checkpoint; `--help` prints the keys."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from nemo_star.commands.importing import heavy_imports
from nemo_star.config.compose import compose
from nemo_star.config.harness import HarnessConfig

LITERAL_KEYS = (
    "checkpoint",
    "cache_dir",
    "cache.folder",
    "include_path",
    "system_instruction",
    "use_cache",
    "output",
)


def main(arguments: Sequence[str]) -> int:
    """Exit code 0. Raises ValueError for a user's error."""
    config = compose(HarnessConfig, arguments, tool="harness", literal_keys=LITERAL_KEYS)
    if config is None:
        return 0
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm_eval is not installed: pip install 'nemo-star[harness]'")
    with heavy_imports(config):
        from nemo_star.evaluation.harness.run import run

    return run(config)
