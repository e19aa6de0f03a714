"""Where requests come from: the command line, or the lines of a file, from where an earlier run stopped. On rank 0."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_star.config.generate import GenerateConfig
from nemo_star.offline.files import InputFile, Resumed, read_resumed
from nemo_star.offline.requests import BadRequest, Request, RequestReader


class RequestSource:
    """Requests in the order of the input.

    Args:
        check: raises ValueError for a request that cannot run.
    """

    def __init__(self, config: GenerateConfig, reader: RequestReader, check: Callable[[Request], None]) -> None:
        self.resumed = Resumed([], 0)
        self.total = 1
        self._config = config
        self._reader = reader
        self._check = check
        self._items: Iterator[Request | BadRequest] = iter(())

    def open(self) -> None:
        """Check all that can be checked without the model.

        Raises:
            ValueError, OSError: a single question that cannot run, an input that cannot be read or continued.
        """
        config = self._config
        if config.input is None:
            request = self._reader.from_text(read_text(config, "context"), read_text(config, "query"))
            self._check(request)
            self._items = iter([request])
            return
        lines = InputFile(config.input)
        if config.output_logits is not None:
            check_distinct(lines.ids())
        if config.resume:
            self.resumed = read_resumed(Path(str(config.output)), lines.ids())
        done = len(self.resumed.answers)
        self.total = sum(1 for _ in lines)
        self._items = (
            self._parsed(line, index) for index, line in enumerate(lines) if self._is_wanted(line, index, done)
        )

    def next(self) -> Request | BadRequest | None:
        """The next one; None after the last."""
        return next(self._items, None)

    def _is_wanted(self, line: bytes, index: int, done: int) -> bool:
        """Whether a line is still to be answered; one that is may name a context that later ones ask of."""
        if index < done and b"context_id" in line:
            self._reader.parse_line(line, index)
        return index >= done

    def _parsed(self, line: bytes, index: int) -> Request | BadRequest:
        """The request of a line if it can run, else what is wrong with it."""
        request = self._reader.parse_line(line, index)
        if isinstance(request, Request):
            try:
                if self._config.output_logits is not None and request.id is None:
                    raise ValueError("output_logits stores logits by id, and this line has none")
                self._check(request)
            except ValueError as error:
                return BadRequest(request.id, request.index, str(error), request.extra)
        return request


def read_text(config: GenerateConfig, name: str) -> str:
    """The context or query of a command line; one newline at the very end of a file is not part of its text."""
    text, path = getattr(config, name), getattr(config, f"{name}_file")
    if text is not None:
        return text
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return content.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}_file={path} is not UTF-8 text: {error}") from error


def check_distinct(ids: Iterator[Any]) -> None:
    """Logits are stored under the request's id: refuse one that comes twice (a line without one is a bad line)."""
    seen: set[str] = set()
    for number, identity in enumerate(ids, start=1):
        if identity is None:
            continue
        if str(identity) in seen:
            raise ValueError(
                f"output_logits stores logits by id, and id {identity!r} of line {number} is not the first"
            )
        if not str(identity).isprintable():
            raise ValueError(f"output_logits stores logits by id, and that of line {number} is no name: {identity!r}")
        seen.add(str(identity))
