"""samples.jsonl: a line for each answered sample, appended whole, so that an interrupted sweep goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_star.offline.files import OutputFile
from nemo_star.runtime.files import write_whole

Key = tuple[str, str, int, str]
"""Contender, task, length, id."""
SAMPLES_FILE = "samples.jsonl"
_SWEEP_FILE = "sweep.json"


class Journal:
    """The samples of one folder.

    Args:
        sweep: what decides what a sample's line is: a folder of another sweep is not continued.

    Raises:
        ValueError: a folder with samples that is neither continued nor replaced, or is of another sweep.
    """

    def __init__(self, folder: Path, sweep: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self._folder = folder
        self._sweep = json.loads(json.dumps(sweep))
        self._file: OutputFile | None = None
        self._kept = 0
        self.lines: dict[Key, dict[str, Any]] = {}
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output={folder} is no folder")
        if (folder / SAMPLES_FILE).exists() and not overwrite:
            if not resume:
                raise ValueError(f"output={folder} holds samples: resume=true (go on) or overwrite=true")
            self._read()

    def open(self) -> None:
        """From here on the folder is written to."""
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._sweep, indent=2) + "\n"
        write_whole(self._folder / _SWEEP_FILE, lambda file: file.write_text(text, encoding="utf-8"))
        self._file = OutputFile(self._folder / SAMPLES_FILE, kept_bytes=self._kept)

    def add(self, key: Key, line: dict[str, Any]) -> None:
        """Write down one sample."""
        assert self._file is not None, "open comes first"
        contender, task, length, identity = key
        whole = {"contender": contender, "task": task, "length": length, "id": identity, **line}
        self._file.write(whole)
        self.lines[key] = whole

    def _read(self) -> None:
        """An earlier run's lines; a torn last one is answered again."""
        before, self.lines, self._kept = read_journal(self._folder)
        if before != self._sweep:
            changed = sorted(name for name in {*before, *self._sweep} if before.get(name) != self._sweep.get(name))
            raise ValueError(f"output={self._folder} is of a sweep with other keys: {', '.join(changed)}")


def read_journal(folder: Path) -> tuple[dict[str, Any], dict[Key, dict[str, Any]], int]:
    """What decides the lines of a folder, its whole lines, and the bytes that they take.

    Raises:
        ValueError: a line that is none.
    """
    sweep, samples = folder / _SWEEP_FILE, folder / SAMPLES_FILE
    before = json.loads(sweep.read_text(encoding="utf-8")) if sweep.is_file() else {}
    content = samples.read_bytes() if samples.is_file() else b""
    kept = content.rfind(b"\n") + 1
    lines = {}
    for line in _lines(content[:kept], folder):
        lines[line["contender"], line["task"], line["length"], line["id"]] = line
    return before, lines, kept


def _lines(content: bytes, folder: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{folder / SAMPLES_FILE}, line {number}: {error}") from None
