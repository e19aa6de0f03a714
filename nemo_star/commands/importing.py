"""What the commands share that run a checkpoint: what is cheap to find out comes before imports that take seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_star.checkpoint.description import read_description
from nemo_star.checkpoint.direct import locate_checkpoint
from nemo_star.config.llm import LLMConfig
from nemo_star.runtime.importing import no_garbage_collection
from nemo_star.runtime.transformer_engine import prepare_imports


@contextmanager
def heavy_imports(config: LLMConfig) -> Iterator[None]:
    """Time to import what needs torch and Megatron.

    Raises:
        ValueError, OSError: before that, where there is no checkpoint.
    """
    place = locate_checkpoint(Path(str(config.checkpoint)), config.cache_dir)
    if not place.is_missing:
        read_description(place.converted)
    with no_garbage_collection():
        prepare_imports()
        yield
