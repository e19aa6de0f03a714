"""The saved contexts of a store: DIR/<owner>/<key>/ for each, and beside it <key>.blocks, by which others that begin
alike find it. Names are digests, so that neither owners nor texts can be read off them.

A context is written aside and renamed, so that several replicas can share the folder: the first one stays, for all
write the same.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from nemo_star.contexts.storage import load_context, save_on_replica
from nemo_star.engine.context import EncodedContext
from nemo_star.engine.engine import Engine
from nemo_star.methods.partition import Partition
from nemo_star.parallel.groups import on_first_rank
from nemo_star.runtime.files import write_whole

_ASIDE = ".aside-"
_RUBBISH_SECONDS = 24 * 3600.0
"""What was left aside so long ago is of a process that was killed."""


@dataclass(frozen=True)
class Name:
    """Where a context is kept, and how it is found."""

    owner: str
    """A digest (`owner_digest`)."""
    digests: tuple[bytes, ...]
    """Of the tokens up to the end of each whole block, then of all tokens (`block_digests`)."""
    tokens: int

    @property
    def key(self) -> str:
        return self.digests[-1].hex()


class ContextFolder:
    """All ranks of a replica call the same methods in the same order.

    Raises:
        ValueError: on all ranks alike: the folder cannot be made or read.
    """

    def __init__(self, engine: Engine, folder: Path, *, fingerprint: str) -> None:
        self._engine = engine
        self._group = engine.groups.replica
        self._folder = folder
        self._fingerprint = fingerprint
        self.known: dict[str, Name] = on_first_rank(self._scanned, self._group)
        """By key: those of earlier processes, too."""

    def has(self, name: Name) -> bool:
        """Whether it is there, saved by whichever replica."""
        place = self._place(name)
        return on_first_rank(place.is_dir, self._group)

    def save(self, name: Name, context: EncodedContext) -> None:
        """Save a context, if it is not there.

        Raises:
            ValueError: on all ranks alike: the disk is full.
        """
        if not self.has(name):
            place = self._place(name)
            aside = on_first_rank(lambda: place.parent / f"{_ASIDE}{uuid.uuid4().hex}", self._group)
            try:
                save_on_replica(self._engine, context, aside, fingerprint=self._fingerprint)
                on_first_rank(lambda: _take_place(aside, place, name), self._group)
            except (OSError, ValueError) as error:
                on_first_rank(lambda: shutil.rmtree(aside, ignore_errors=True), self._group)
                raise ValueError(f"a context cannot be kept in {self._folder}: {error}") from error
        self.known[name.key] = name

    def load(self, name: Name, partition: Partition | None = None) -> EncodedContext:
        """A saved context, or the first tokens of it (`load_context`).

        Raises:
            ValueError: on all ranks alike: it is damaged, or gone.
        """
        place = self._place(name)
        return load_context(self._engine, place, fingerprint=self._fingerprint, partition=partition)

    def remove(self, name: Name) -> None:
        """Delete a context, if it is there."""
        self.known.pop(name.key, None)
        place = self._place(name)
        on_first_rank(lambda: _remove(place), self._group)

    def remove_owner(self, owner: str) -> None:
        """Delete all contexts of an owner (a digest), also those of earlier processes."""
        self.known = {key: name for key, name in self.known.items() if name.owner != owner}
        on_first_rank(lambda: shutil.rmtree(self._folder / owner, ignore_errors=True), self._group)

    def _place(self, name: Name) -> Path:
        return self._folder / name.owner / name.key

    def _scanned(self) -> dict[str, Name]:
        """What is there; what a killed process left half-written goes."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for aside in self._folder.glob(f"*/{_ASIDE}*"):
                if time.time() - aside.stat().st_mtime > _RUBBISH_SECONDS:
                    shutil.rmtree(aside, ignore_errors=True)
            found = [_read_blocks(file) for file in sorted(self._folder.glob("*/*.blocks"))]
        except OSError as error:
            raise ValueError(f"contexts cannot be kept in {self._folder}: {error}") from error
        return {name.key: name for name in found if name is not None and self._place(name).is_dir()}


def _take_place(aside: Path, place: Path, name: Name) -> None:
    """The name, and the blocks, of a context that is complete; unless another replica was first."""
    values = {"tokens": name.tokens, "digests": [digest.hex() for digest in name.digests]}
    try:
        aside.rename(place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(aside, ignore_errors=True)
        return
    write_whole(place.with_suffix(".blocks"), lambda file: file.write_text(json.dumps(values), encoding="utf-8"))


def _read_blocks(file: Path) -> Name | None:
    """None where it is damaged: its context is still found as a whole."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        digests = tuple(bytes.fromhex(digest) for digest in values["digests"])
        name = Name(file.parent.name, digests, int(values["tokens"]))
    except (ValueError, KeyError, TypeError):
        return None
    return name if name.key == file.stem else None


def _remove(place: Path) -> None:
    place.with_suffix(".blocks").unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)
