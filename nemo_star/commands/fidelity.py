"""How near attention methods with blocks come to dense attention, without labels; `--help` prints the keys."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_star.commands.importing import heavy_imports
from nemo_star.config.compose import compose
from nemo_star.config.fidelity import FidelityConfig

LITERAL_KEYS = ("checkpoint", "cache_dir", "cache.folder", "input", "output", "data", "scores")


def main(arguments: Sequence[str]) -> int:
    """Exit code 0. Raises ValueError for a user's error."""
    config = compose(FidelityConfig, arguments, tool="fidelity", literal_keys=LITERAL_KEYS)
    if config is None:
        return 0
    with heavy_imports(config):
        from nemo_star.evaluation.fidelity.run import run

    return run(config)
