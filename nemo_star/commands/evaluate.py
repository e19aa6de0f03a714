"""What attention methods cost in accuracy, on tasks of long contexts or given samples; `--help` prints the keys."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_star.commands.importing import heavy_imports
from nemo_star.config.compose import compose
from nemo_star.config.evaluate import EvaluateConfig

LITERAL_KEYS = ("checkpoint", "cache_dir", "cache.folder", "input", "output", "data")


def main(arguments: Sequence[str]) -> int:
    """Exit code 0. Raises ValueError for a user's error."""
    config = compose(EvaluateConfig, arguments, tool="evaluate", literal_keys=LITERAL_KEYS)
    if config is None:
        return 0
    with heavy_imports(config):
        from nemo_star.evaluation.run import run

    return run(config)
