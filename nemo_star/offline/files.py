"""JSON lines in files: read more than once, written whole, continued."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_star.offline.requests import json_fields
from nemo_star.text.ids import is_unicode


class InputFile:
    """The lines of a JSONL file as bytes, or of standard input for `-`; can be gone through more than once."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lines: list[bytes] | None = None
        if path == "-":
            self._lines = list(sys.stdin.buffer)
        elif not stat.S_ISREG(os.stat(path).st_mode):  # a pipe gives its lines only once
            self._lines = list(self._read())
        else:
            next(self._read(), None)  # fails now if it cannot be read

    def __iter__(self) -> Iterator[bytes]:
        return self._read() if self._lines is None else iter(self._lines)

    def _read(self) -> Iterator[bytes]:
        with open(self._path, "rb") as file:
            yield from file

    def ids(self) -> Iterator[Any]:
        """The `id` of each line, None where a line has none or is no JSON object."""
        for line in self:
            try:
                yield json_fields(line).get("id")
            except ValueError:
                yield None


class OutputFile:
    """JSON lines, appended whole and flushed one by one; `path` None means standard output.

    Opening keeps the first `kept_bytes` bytes. A line that could not be written in full (a full disk) is taken back
    before the error is raised.
    """

    def __init__(self, path: Path | None, *, kept_bytes: int = 0) -> None:
        self._name = "standard output" if path is None else str(path)
        self._descriptor = 1
        self._regular = False
        if path is None:
            return
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._regular = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        if self._regular:
            os.ftruncate(self._descriptor, kept_bytes)
            os.lseek(self._descriptor, kept_bytes, os.SEEK_SET)

    def write(self, answer: Mapping[str, Any]) -> None:
        line = _json_line(answer)
        end = os.lseek(self._descriptor, 0, os.SEEK_CUR) if self._regular else 0
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            if self._regular:
                os.ftruncate(self._descriptor, end)
            raise OSError(error.errno, error.strerror, self._name) from error


@dataclass(frozen=True)
class Resumed:
    """What an earlier run wrote: whole lines, and the bytes they take; a torn last line is written again."""

    answers: list[dict[str, Any]]
    kept_bytes: int


def read_resumed(path: Path, ids: Iterator[Any]) -> Resumed:
    """Read an output to be continued, which must be the beginning of this input's answers. Nothing is changed yet.

    Raises:
        ValueError: the file holds other things than answers, or those of another input.
    """
    content = path.read_bytes() if path.exists() else b""
    kept = content.rfind(b"\n") + 1
    if content and not kept and not content.startswith(b"{"):
        raise ValueError(f"cannot resume: {path} holds no answers")
    answers = []
    for number, line in enumerate(content[:kept].split(b"\n")[:-1], start=1):
        try:
            answer = json_fields(line)
        except ValueError as error:
            raise ValueError(f"cannot resume: {path}, line {number} is no answer: {error}") from error
        answers.append(answer)
        try:
            identity = next(ids)
        except StopIteration:
            raise ValueError(f"cannot resume: {path} holds more than the {number - 1} lines of the input") from None
        if json.dumps(answer.get("id")) != json.dumps(identity):
            raise ValueError(
                f"cannot resume: {path}, line {number} has id {answer.get('id')!r}, the input's has {identity!r}"
            )
    return Resumed(answers, kept)


def _json_line(answer: Mapping[str, Any]) -> bytes:
    """One line of UTF-8, also for readers that take Unicode's other line ends for ends."""
    text = json.dumps(answer, ensure_ascii=False)
    if not is_unicode(text) or len(text.splitlines()) > 1:
        text = json.dumps(answer)
    return (text + "\n").encode()
