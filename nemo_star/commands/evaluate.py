"""What attention methods cost in accuracy, on RULER's tasks or given samples; `--help` prints the keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_star.checkpoint.description import read_description
from nemo_star.checkpoint.direct import locate_checkpoint
from nemo_star.config.compose import compose
from nemo_star.config.evaluate import EvaluateConfig
from nemo_star.runtime.importing import no_garbage_collection
from nemo_star.runtime.transformer_engine import prepare_imports

LITERAL_KEYS = ("checkpoint", "cache_dir", "cache.folder", "input", "output", "data")


def main(arguments: Sequence[str]) -> int:
    """Exit code 0. Raises ValueError for a user's error."""
    config = compose(EvaluateConfig, arguments, tool="evaluate", literal_keys=LITERAL_KEYS)
    if config is None:
        return 0
    # A wrong path is found before torch and Megatron are imported, which takes seconds.
    place = locate_checkpoint(Path(str(config.checkpoint)), config.cache_dir)
    if not place.is_missing:
        read_description(place.converted)
    with no_garbage_collection():
        prepare_imports()
        from nemo_star.evaluation.run import run  # only now: importing Megatron takes seconds

    return run(config)
