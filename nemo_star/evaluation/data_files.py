"""Files that a benchmark takes from elsewhere: a user puts them into the folder `data`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Part = TypeVar("Part")


@dataclass(frozen=True)
class DataFile:
    """A file, or a folder of them."""

    name: str
    content: str
    source: str
    """Where it comes from."""

    def place(self, data: Path | None) -> Path:
        """Where it lies.

        Raises:
            ValueError: it is missing; says what to put there and where it comes from.
        """
        if data is None:
            raise ValueError(f"this task needs a folder `data` with {self._wanted}")
        path = data / self.name
        if not path.exists():
            raise ValueError(f"{path} is missing: put there {self._wanted}")
        return path

    def read(self, data: Path | None, take: Callable[[str], Part]) -> Part:
        """What `take` takes from its text.

        Raises:
            ValueError: the file is missing, or has not the format of its source.
        """
        path = self.place(data)
        try:
            return take(path.read_text(encoding="utf-8"))
        except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
            raise self.wrong(path, error) from error

    def wrong(self, path: Path, error: object) -> ValueError:
        return ValueError(f"{path} has not the format that it should have ({error!r}): put there {self._wanted}")

    @property
    def _wanted(self) -> str:
        return f"{self.name} ({self.content}); its source is {self.source}"
