"""What describes a saved context.

DIR/index.json     format version, weights, method, shape, the files and what is in them; read first, replaced last
DIR/<32 digits>/   what one save wrote: tokens.safetensors, and a file for each rank (cp, pp, tp) that saved
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_star.config.strict import parse
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.partition import Span

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
TOKENS_FILE = "tokens.safetensors"
_OURS = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.json")


@dataclass(frozen=True)
class Shard:
    """A file of K/V: `k.<layer>` and `v.<layer>` for each of its layers, [tokens, groups, channels]."""

    file: str
    size: int
    """Bytes."""
    sha256: str
    layer_numbers: tuple[int, ...]
    """Megatron's, 1-based."""
    first_group: int
    """Of all KV heads."""
    groups: int
    spans: tuple[Span, ...]
    """Tokens of the context that full layers have, in order; windowed ones have those from `windowed_from` on."""


@dataclass(frozen=True)
class ContextIndex:
    """Content of index.json."""

    format_version: int
    fingerprint: str
    """Of the weights."""
    attention: AttentionConfig
    """The method's settings, sizes settled."""
    dtype: str
    """Of K and V."""
    num_layers: int
    num_query_groups: int
    kv_channels: int
    windowed_layers: tuple[int, ...]
    """Megatron's numbers, 1-based."""
    windowed_from: int
    """First token that windowed layers hold."""
    tokens: int
    """Of the context."""
    data: str
    """Folder with the files."""
    tokens_size: int
    tokens_sha256: str
    shards: tuple[Shard, ...]


def write_index(folder: Path, index: ContextIndex) -> None:
    """Let the index take its name, with all it describes on disk, and remove what earlier saves wrote.

    Raises:
        OSError: the disk is full.
    """
    sync_folder(folder / index.data)
    aside = folder / f".{index.data}.json"
    with aside.open("x", encoding="utf-8") as output:
        json.dump(asdict(index), output, indent=1)
        output.flush()
        os.fsync(output.fileno())
    aside.replace(folder / INDEX_FILE)
    sync_folder(folder)
    for other in folder.iterdir():
        if _is_ours(other) and other.name not in (index.data, INDEX_FILE):
            shutil.rmtree(other, ignore_errors=True) if other.is_dir() else other.unlink(missing_ok=True)


def new_data(folder: Path) -> str:
    """A new folder in `folder`, which is made, for what is written now; its name.

    Raises:
        ValueError: the folder holds something else than a saved context.
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(other.name for other in folder.iterdir() if not _is_ours(other))
    if others:
        raise ValueError(f"{folder} holds {others[0]}, which belongs to no saved context: give a folder of its own")
    name = uuid.uuid4().hex
    (folder / name).mkdir()
    return name


def discard(folder: Path, data: str) -> None:
    """Remove what a save that failed has written, unless the index came to name it."""
    try:
        if read_index(folder).data == data:
            return
    except ValueError:
        pass
    shutil.rmtree(folder / data, ignore_errors=True)


def _is_ours(file: Path) -> bool:
    return file.name == INDEX_FILE or bool(_OURS.fullmatch(file.name))


def sync_folder(folder: Path) -> None:
    """The names in a folder, down to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_index(folder: Path) -> ContextIndex:
    """The index of a saved context.

    Raises:
        ValueError: nothing is saved there, or in another format version, or the index is damaged.
    """
    file = folder / INDEX_FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no saved context: it has no {INDEX_FILE}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version = values["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"saved context {folder}: {INDEX_FILE} is damaged ({error}); save it again") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"saved context {folder} has format version {version}, this program reads {FORMAT_VERSION}")
    try:
        return parse(ContextIndex, values)
    except ValueError as error:
        raise ValueError(f"saved context {folder}: {INDEX_FILE} is damaged ({error}); save it again") from error
