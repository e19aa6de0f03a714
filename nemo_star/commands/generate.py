"""Answer questions about long contexts with a converted checkpoint; `--help` prints the keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_star.checkpoint.description import read_description
from nemo_star.checkpoint.direct import locate_checkpoint
from nemo_star.config.compose import compose
from nemo_star.config.generate import GenerateConfig
from nemo_star.runtime.importing import no_garbage_collection
from nemo_star.runtime.transformer_engine import prepare_imports

LITERAL_KEYS = (
    "checkpoint",
    "cache_dir",
    "cache.folder",
    "context",
    "context_file",
    "query",
    "query_file",
    "input",
    "output",
    "output_logits",
    "debug.dump",
)


def main(arguments: Sequence[str]) -> int:
    """Exit code 0: all answered; 3: some lines of the input were bad. Raises ValueError for a user's error."""
    config = compose(GenerateConfig, arguments, tool="generate", literal_keys=LITERAL_KEYS)
    if config is None:
        return 0
    # A wrong path is found before torch and Megatron are imported, which takes seconds.
    place = locate_checkpoint(Path(str(config.checkpoint)), config.cache_dir)
    if not place.is_missing:
        read_description(place.converted)
    with no_garbage_collection():
        prepare_imports()
        # Only now: importing Megatron takes seconds.
        if config.interactive:
            from nemo_star.offline.chat import run
        else:
            from nemo_star.offline.generate import run

    return run(config)
