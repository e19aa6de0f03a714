"""The working directory of a conversion, beside its target, and the journal of what is complete in it.

A directory takes the target's name when all went well, so a target is whole or absent. One process converts into a
target at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_star.runtime.launch import warn

_JOURNAL = ".journal"
_LOCK = ".lock"
_SPARE_BYTES = 16 * 2**20
"""For what stands beside the weights."""


@dataclass(frozen=True)
class Written:
    """A complete file."""

    file: str
    """Name below the working directory."""
    size: int
    """Bytes."""
    sha256: str
    note: Any
    """What its writer wants to know again, as JSON has it."""


class Journal:
    """Which files of a working directory are complete: a line of JSON each, after one that says whose they are."""

    def __init__(self, working: Path, identity: str) -> None:
        self._file = working / _JOURNAL
        self.written: dict[str, Written] = {}
        text = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        lines = text.splitlines()
        if not lines or lines[0] != identity:
            empty(working)
            self._append(identity)
            return
        if not text.endswith("\n"):  # killed while the last line was written
            self._append("")
        for line in lines[1:]:
            try:
                written = Written(**json.loads(line))
            except (ValueError, TypeError):
                continue
            file = working / written.file
            if file.is_file() and file.stat().st_size == written.size:
                self.written[written.file] = written

    @staticmethod
    def lines(working: Path) -> int:
        """Of the journal, if there is one."""
        file = working / _JOURNAL
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def add(self, written: Written) -> None:
        """Note a file; what is kept is what a resumed conversion would read."""
        line = json.dumps(asdict(written))
        self._append(line)
        self.written[written.file] = Written(**json.loads(line))

    def _append(self, line: str) -> None:
        with open(self._file, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def empty(working: Path) -> None:
    """Remove what an earlier conversion left: all but the lock, which this process holds."""
    for path in working.iterdir():
        if path.name == _LOCK:
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_space(working: Path, needed: int) -> None:
    """A ValueError where the disk of `working` has no room for `needed` bytes."""
    free = shutil.disk_usage(working).free
    if needed + _SPARE_BYTES > free:
        raise ValueError(
            f"what is to be written takes {needed / 1e9:.2f} GB, and {working.parent} has {free / 1e9:.2f} GB free: "
            "make room, or give a target (cache_dir) elsewhere"
        )


class TargetExists(ValueError):
    """Somebody has been faster."""


def refuse_existing(target: Path) -> None:
    """Before anything is read."""
    if target.exists():
        raise TargetExists(f"target {target} exists: give a new directory or remove it first")


@contextmanager
def new_directory(target: Path, *, wait: bool = False) -> Iterator[Path]:
    """The working directory of `target`, held by this process alone; takes the target's name when all went well.

    If it fails, complete files stay there, and the next conversion to the same target goes on in it; without one it is
    removed.

    Args:
        wait: for another process that converts into `target`, instead of refusing.

    Raises:
        TargetExists: `target` exists, now or after waiting.
    """
    working = target.parent / f".{target.name}.partial"
    lock = _lock(working, target, wait=wait)
    try:
        yield working
        working.rename(target)
        for name in (_JOURNAL, _LOCK):
            (target / name).unlink(missing_ok=True)
    except BaseException:
        if Journal.lines(working) > 1:
            warn(f"what was converted stays in {working}: the same command goes on after it")
        else:
            shutil.rmtree(working, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock(working: Path, target: Path, *, wait: bool) -> int:
    """An open lock file in `working`, which is made where it is not there; released when it is closed."""
    while True:
        refuse_existing(target)
        working.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(working / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        except FileNotFoundError:  # the other process has finished meanwhile
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(lock), os.stat(working / _LOCK)):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(lock)
            raise ValueError(f"another process is converting into {target}: let it finish") from None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
