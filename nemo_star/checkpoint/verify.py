"""Checksums of weight files, written at conversion and compared on demand: reading everything takes time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from nemo_star.checkpoint.description import WEIGHTS_FOLDER, CheckpointDescription, checksum
from nemo_star.runtime.launch import environment_rank


def checksums(files: Sequence[Path], label: str) -> Iterator[str]:
    """SHA-256 of each file, several at a time: hashing leaves other threads the interpreter."""
    total = sum(file.stat().st_size for file in files)
    silent = environment_rank() > 0
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=silent, leave=False) as bar,
    ):
        for file, digest in zip(files, pool.map(checksum, files), strict=True):
            bar.update(file.stat().st_size)
            yield digest


def require_checksums(directory: Path, description: CheckpointDescription) -> None:
    """A ValueError where there is nothing to compare with."""
    if description.weight_files and not description.sha256:
        raise ValueError(
            f"checkpoint {directory} is of format version {description.format_version}, which has no checksums: "
            "convert it again, or leave out verify"
        )


def verify_checkpoint(directory: Path, description: CheckpointDescription, *, share: tuple[int, int] = (0, 1)) -> None:
    """Compare the weight files with the checksums of their description, which was read from `directory`.

    Args:
        share: (number, count): of the ranks of one machine, this one's files are every `count`-th.

    Raises:
        ValueError: a file with another content, by name; a checkpoint that has no checksums.
    """
    require_checksums(directory, description)
    number, count = share
    names = sorted(description.sha256)[number::count]
    files = [directory / WEIGHTS_FOLDER / name for name in names]
    for name, digest in zip(names, checksums(files, "verify"), strict=True):
        if digest != description.sha256[name]:
            raise ValueError(
                f"checkpoint {directory} is damaged: {WEIGHTS_FOLDER}/{name} has SHA-256 {digest}, should have "
                f"{description.sha256[name]}; copy or convert it again"
            )
