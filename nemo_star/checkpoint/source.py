"""What a checkpoint's folder is, told by its files, and whether it is still the same. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from nemo_star.checkpoint.description import FORMAT_VERSION

_NOT_READ = (".md", ".png", ".jpg", ".gguf", ".lock")


def fingerprint(source: Path, *more: str) -> str:
    """Changes when a source does: of config.json's content, and of names, sizes and times of the files beside it.

    Args:
        more: settings of a conversion that count, too.
    """
    files = sorted(file for file in source.iterdir() if file.is_file() and not file.name.endswith(_NOT_READ))
    listed = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    config = source / "config.json"
    text = config.read_bytes() if config.is_file() else b""
    plan = json.dumps([FORMAT_VERSION, hashlib.sha256(text).hexdigest(), listed, more])
    return hashlib.sha256(plan.encode()).hexdigest()
