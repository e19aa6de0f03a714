"""Files that a tool writes: checked before the work, complete or absent after it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def check_target(
    key: str, path: str | None, *, replace: bool, ways: str = "overwrite=true", streams: bool = False
) -> None:
    """An output that exists is not overwritten unasked, one that cannot be written is noticed now.

    Raises:
        ValueError: names the key, the path, and in `ways` how to go on where the file exists. A pipe or device is
            refused unless the file is written as a stream (`streams`).
    """
    if path is None:
        return
    if os.path.isdir(path):
        raise ValueError(f"{key}={path} is a directory: give a file")
    if os.path.exists(path) and not os.path.isfile(path):
        if not streams:
            raise ValueError(f"{key}={path} is no regular file: give one that can be written at the end as a whole")
        return
    if os.path.exists(path) and not replace:
        raise ValueError(f"{key}={path} exists: give another file or {ways}")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"{key}={path}: folder {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK) or (os.path.exists(path) and not os.access(path, os.W_OK)):
        raise ValueError(f"{key}={path} cannot be written: permission denied")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path` (what a link leads to), which takes the name when complete."""
    path = path.resolve()
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp's is private
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
