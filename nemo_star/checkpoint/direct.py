"""A Hugging Face directory given as a checkpoint: converted once into a cache folder, and found there afterwards."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nemo_star.checkpoint.description import (
    DESCRIPTION_FILE,
    HF_FOLDER,
    CheckpointDescription,
    read_description,
)
from nemo_star.checkpoint.source import fingerprint
from nemo_star.runtime.launch import environment_rank


@dataclass(frozen=True)
class CheckpointPlace:
    """A checkpoint as it was given, and where it is (or will be) converted: the same folder, if it is already."""

    given: Path
    converted: Path

    @property
    def is_missing(self) -> bool:
        """Whether it has to be converted yet."""
        return self.converted != self.given and not self.converted.exists()

    @property
    def companions(self) -> Path:
        """Folder of configuration and tokenizer files."""
        return self.given if self.is_missing else self.converted / HF_FOLDER

    def describe(self) -> CheckpointDescription:
        """Its description; of one that is missing, what it will be, without files.

        Raises:
            ValueError: a damaged checkpoint, or a Hugging Face directory that cannot be converted.
        """
        if not self.is_missing:
            return read_description(self.converted)
        from nemo_star.checkpoint.importing import plan_import  # only where something is converted

        return plan_import(self.given).description()

    def convert(self) -> None:
        """Convert it, if it is missing, or wait until another process has.

        Raises:
            ValueError: too little space.
        """
        if not self.is_missing:
            return
        from nemo_star.checkpoint.directory import TargetExists
        from nemo_star.checkpoint.importing import import_checkpoint

        if environment_rank() == 0:
            print(f"converting {self.given}, once, into {self.converted} (cache_dir)", file=sys.stderr, flush=True)
        with suppress(TargetExists):  # made by the process that this one has waited for
            import_checkpoint(self.given, self.converted, wait=True)


def locate_checkpoint(folder: Path, cache_dir: str | None) -> CheckpointPlace:
    """Where the converted checkpoint of `folder` is. Needs no torch, and reads no weights.

    Args:
        folder: a converted checkpoint, or a Hugging Face directory.
        cache_dir: for converted ones; None: nemo_star in the user's folder for caches.
    """
    if (folder / DESCRIPTION_FILE).is_file() or not (folder / "config.json").is_file():
        return CheckpointPlace(folder, folder)
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_star"
    cache = Path(cache_dir).expanduser() if cache_dir else default
    name = f"{folder.resolve().name}-{fingerprint(folder)[:16]}"
    return CheckpointPlace(folder, cache.resolve() / name)
