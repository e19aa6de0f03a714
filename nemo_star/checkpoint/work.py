"""The files of a conversion, written one by one into a working directory beside the target, which takes its name last.

A file is complete when it has its name; the journal then has its size and checksum. A conversion that was killed goes
on after the last of them, if its source and what is wanted are the same. One process converts into a target at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tqdm import tqdm

from nemo_star.runtime.launch import environment_rank, warn

_JOURNAL = ".journal"
_LOCK = ".lock"
_SPARE_BYTES = 16 * 2**20
"""For what stands beside the weights."""


@dataclass(frozen=True)
class Part:
    """One file of a conversion."""

    file: str
    """Name below the working directory."""
    size: int
    """Bytes, about."""
    tensors: int
    write: Callable[[BinaryIO, Callable[[], None]], Any]
    """Writes the content, calls the function after each tensor; returns what is worth noting, as JSON has it."""


@dataclass(frozen=True)
class Written:
    """A complete file."""

    file: str
    size: int
    sha256: str
    note: Any


class Job(Protocol):
    """A conversion that any process can do a part of: it goes to them by pickle."""

    def parts(self) -> AbstractContextManager[Sequence[Part]]:
        """All files, the same ones in the same order in every process."""
        ...


class _Hashing:
    """A file that is written once from front to end, and its checksum."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._stream.write(data)
        count = memoryview(data).nbytes
        self._size += count
        return count

    def flush(self) -> None:
        self._stream.flush()

    def tell(self) -> int:
        return self._size

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def convert(
    job: Job, parts: Sequence[Part], working: Path, *, identity: str, processes: int, label: str
) -> list[Written]:
    """Write what is not written yet; returns all files in the order of `parts`.

    Args:
        identity: of source and settings; files of a conversion with another one are removed.

    Raises:
        ValueError: less free space than the files take.
    """
    plan = json.dumps([identity, [(part.file, part.size) for part in parts]])
    journal = _Journal(working, hashlib.sha256(plan.encode()).hexdigest())
    missing = [number for number, part in enumerate(parts) if part.file not in journal.written]
    check_space(working, sum(parts[number].size for number in missing))
    bar = tqdm(
        total=sum(part.tensors for part in parts),
        initial=sum(part.tensors for part in parts if part.file in journal.written),
        desc=label,
        unit="tensor",
        disable=environment_rank() > 0,
    )
    with bar:
        if processes > 1 and len(missing) > 1:
            for number, written in _in_processes(job, missing, working, min(processes, len(missing))):
                journal.add(written)
                bar.update(parts[number].tensors)
        else:
            for number in missing:
                journal.add(_write(parts[number], working, lambda: bar.update()))
    return [journal.written[part.file] for part in parts]


def _write(part: Part, working: Path, on_tensor: Callable[[], object]) -> Written:
    file = working / part.file
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.part")
    with open(unfinished, "wb") as stream:
        hashing = _Hashing(stream)
        note = part.write(hashing, on_tensor)  # type: ignore[arg-type]  # the part of a file that writers use
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(file)
    return Written(part.file, hashing.tell(), hashing.hexdigest(), note)


def _in_processes(job: Job, missing: Sequence[int], working: Path, processes: int) -> Iterator[tuple[int, Written]]:
    """Numbers of files, and the files, as they are complete; each process writes one at a time."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_write_elsewhere, job, number, working, processes): number for number in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise OSError("a process of the conversion was killed (out of memory?): try fewer of them") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _write_elsewhere(job: Job, number: int, working: Path, processes: int) -> Written:
    import torch  # the module itself does without

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    with job.parts() as parts:
        return _write(parts[number], working, lambda: None)


class _Journal:
    """Which files of a working directory are complete: a line of JSON each, after one that says whose they are."""

    def __init__(self, working: Path, identity: str) -> None:
        self._file = working / _JOURNAL
        self.written: dict[str, Written] = {}
        text = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        lines = text.splitlines()
        if not lines or lines[0] != identity:
            _empty(working)
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


def _empty(working: Path) -> None:
    """All but the lock, which this process holds."""
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
        if _Journal.lines(working) > 1:
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
