"""results.json and results.md of one folder: what each step came to, written whole after each of them."""

from __future__ import annotations

import fcntl
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_star.benchmarking.gpu_check.markdown import document
from nemo_star.benchmarking.gpu_check.steps import OUTPUT, Step
from nemo_star.runtime.files import write_whole

Record = dict[str, Any]
RESULTS, REPORT = "results.json", "results.md"
_LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone.

    Raises:
        ValueError: it is no folder, or another process has it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={folder} is no folder")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:  # let go by the system however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"output={folder} is being filled by another gpu-check: wait for it or end it") from None
        yield


class Ledger:
    """A record for each step, those of earlier calls read from the folder.

    A record: `name`, `command`, `limit_seconds`, `state` (not begun, running, done, failed, timed out, interrupted),
    `started` (UTC), `seconds`, `exit_code`, `reason`, `log_tail` where it is not done, `rows`, `about`.

    Args:
        about: project, packages and machine of this call. What was done with another is not done.

    Raises:
        ValueError: a results.json that is none.
    """

    def __init__(self, folder: Path, steps: Sequence[Step], about: Mapping[str, Any]) -> None:
        self._folder = folder
        self._about = dict(about)
        before = self._read()
        self._earlier: list[Record] = before["earlier"]
        found = {record["name"]: record for record in before["steps"] if record["state"] != "not begun"}
        fresh = {step.name: self._fresh(step) for step in steps}
        self._records: dict[str, Record] = {**fresh, **found}

    def _read(self) -> dict[str, Any]:
        file = self._folder / RESULTS
        if not file.exists():
            return {"steps": [], "earlier": []}
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return {key: found[key] for key in ("steps", "earlier")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} was not written by gpu-check ({error!r}): give another output=FOLDER") from None

    def _fresh(self, step: Step) -> Record:
        command = ["python", *shown_command(step)]
        return {"name": step.name, "command": command, "limit_seconds": step.limit_seconds, "state": "not begun"}

    def marks(self) -> Iterator[str]:
        """Of steps whose check was killed, which may have left processes."""
        return (record["mark"] for record in self._records.values() if record["state"] == "running")

    def is_done(self, step: Step) -> bool:
        """By the same command, commit, packages and machine."""
        record = self._records[step.name]
        same = record["command"] == self._fresh(step)["command"] and record.get("about") == self._about
        return same and record["state"] == "done"

    def begin(self, step: Step, *, mark: str, started: str) -> None:
        """Note that a step runs; a result that it had is kept under `earlier`."""
        old = self._records[step.name]
        if old["state"] == "done":
            self._earlier.append(old)
        running = {"state": "running", "mark": mark, "started": started, "about": self._about}
        self._records[step.name] = {**self._fresh(step), **running}
        self.write()

    def end(self, step: Step, outcome: Mapping[str, Any]) -> None:
        """Note what it came to."""
        record = self._records[step.name]
        del record["mark"]
        record.update(outcome)
        self.write()

    def record(self, step: Step) -> Record:
        return self._records[step.name]

    def settle(self) -> None:
        """What still counts as running was killed with its check."""
        for record in self._records.values():
            if record["state"] == "running":
                del record["mark"]
                record.update(state="interrupted", reason="gpu-check was killed while it ran")
        self.write()

    def write(self) -> None:
        """Both files."""
        records = list(self._records.values())
        whole = {"about": self._about, "steps": records, "earlier": self._earlier}
        texts = {RESULTS: json.dumps(whole, indent=2) + "\n", REPORT: document(records, self._about)}
        for name, text in texts.items():
            write_whole(self._folder / name, functools.partial(Path.write_text, data=text, encoding="utf-8"))


def shown_command(step: Step) -> list[str]:
    """With the file of rows by its name in the folder."""
    return [word.replace(OUTPUT, rows_file(step)) for word in step.command]


def rows_file(step: Step) -> str:
    return f"{step.name}.json"


def log_file(step: Step) -> str:
    return f"{step.name}.log"
