"""Requests in, answers out: JSON lines, validated one by one."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_star.text.tokenizer import Tokenizer

_ALIASES = {"index": "id", "input_context": "context", "input_query": "query"}
"""Field names of the published reference implementation."""
_OWN_FIELDS = ("id", "context", "context_ids", "query", "query_ids")


@dataclass(frozen=True)
class Request:
    """One question on one context, ready to run."""

    id: Any
    index: int
    """Line index in the input, from 0; added to the seed."""
    context_ids: list[int]
    query_ids: list[int]
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the input line, passed through."""


@dataclass(frozen=True)
class BadRequest:
    """A line that cannot run, and why."""

    id: Any
    index: int
    error: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RequestReader:
    """Turns input lines into requests. `vocab_size` bounds token ids; text needs a tokenizer."""

    vocab_size: int
    tokenizer: Tokenizer | None
    chat_template: bool = False

    def parse_line(self, line: bytes, index: int) -> Request | BadRequest:
        """One JSON line; what is wrong with it comes back as a BadRequest."""
        fields: Mapping[str, Any] = {}
        try:
            fields = _fields(line)
            return self._request(fields, index)
        except ValueError as error:
            return BadRequest(fields.get("id"), index, str(error), _extra(fields))

    def from_text(self, context: str, query: str) -> Request:
        """The one request of a command line."""
        return self._request({"id": 0, "context": context, "query": query}, 0)

    def _request(self, fields: Mapping[str, Any], index: int) -> Request:
        texts = {name: fields.get(name) for name in ("context", "query")}
        ids: dict[str, Any] = {name: fields.get(f"{name}_ids") for name in ("context", "query")}
        for name in ("context", "query"):
            if (texts[name] is None) == (ids[name] is None):
                raise ValueError(f"give either {name} (text) or {name}_ids (token ids)")
        if any(text is not None for text in texts.values()):
            encoded = self._encode(texts)
            ids = {name: encoded[name] if ids[name] is None else ids[name] for name in ids}
        for name, values in ids.items():
            self._check_ids(name, values)
        return Request(fields.get("id"), index, ids["context"], ids["query"], _extra(fields))

    def _encode(self, texts: Mapping[str, Any]) -> dict[str, list[int]]:
        for name, text in texts.items():
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{name} must be a string, not {type(text).__name__}")
            if text == "":
                raise ValueError(f"the {name} is empty")
            if text is not None and not _is_unicode(text):
                raise ValueError(f"the {name} holds half of a surrogate pair: not valid Unicode text")
        if self.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer: give token ids (context_ids, query_ids) instead of text")
        if None in texts.values() and self.chat_template:
            raise ValueError("chat_template=true needs both context and query as text")
        # A text given beside token ids is tokenized with a stand-in for the other one.
        context, query = (text if text is not None else "." for text in texts.values())
        context_ids, query_ids = self.tokenizer.encode(context, query, chat_template=self.chat_template)
        return {"context": context_ids, "query": query_ids}

    def _check_ids(self, name: str, ids: Any) -> None:
        if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise ValueError(f"{name}_ids must be a list of integers")
        if not ids:
            raise ValueError(f"the {name} is empty")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} holds token id {wrong}, outside the vocabulary of {self.vocab_size} tokens")


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    renamed: dict[str, Any] = {}
    for key, value in fields.items():
        name = _ALIASES[key] if key in _ALIASES and _ALIASES[key] not in fields else key
        renamed[name] = value
    return renamed


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _extra(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in _OWN_FIELDS}


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
                yield _fields(line).get("id")
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
            answer = _fields(line)
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
    if not _is_unicode(text) or len(text.splitlines()) > 1:
        text = json.dumps(answer)
    return (text + "\n").encode()
