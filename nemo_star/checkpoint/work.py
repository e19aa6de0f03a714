"""The files of a conversion, written one by one into a working directory, by one or several processes.

A file is complete when it has its name; the journal then has its size and checksum. A conversion that was killed goes
on after the last of them, if its source and what is wanted are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tqdm import tqdm

from nemo_star.checkpoint.directory import Journal, Written, check_space
from nemo_star.runtime.launch import environment_rank


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
    journal = Journal(working, hashlib.sha256(plan.encode()).hexdigest())
    missing = [number for number, part in enumerate(parts) if part.file not in journal.written]
    check_space(working, sum(parts[number].size for number in missing))
    if journal.written and environment_rank() == 0:
        print(f"going on in {working}: {len(journal.written)} of {len(parts)} files are there", file=sys.stderr)
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
