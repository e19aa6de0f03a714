"""`.metadata` of a torch_dist checkpoint: which tensor lies where. It is a pickle, which can run anything when read.

Here nothing but the classes that describe tensors is let in; what torch and Megatron read themselves, by plain pickle,
is a file that was read so before, or written here.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

METADATA_FILE = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED = {
    _CHECKPOINT + "metadata": (
        "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
        "_MEM_FORMAT_ENCODING StorageMeta"
    ),
    _CHECKPOINT + "filesystem": "_StorageInfo _StoragePrefix",
    _CHECKPOINT + "planner": "SavePlan WriteItem WriteItemType TensorWriteData",
    "torch.serialization": "_get_layout",
    "torch": "Size",
    "collections": "OrderedDict",
    "builtins": "set frozenset dict list",
    "pathlib": "PosixPath PurePosixPath Path",
    "pathlib._local": "PosixPath PurePosixPath Path",
}
_MEGATRON = ("megatron.core.dist_checkpointing.strategies.torch", ("MCoreMetadata", "MCoreSavePlan"))
"""Of Megatron 0.15 and before; read without Megatron, whose import takes seconds."""


class _Plain:
    """Takes the place of a class of which only the attributes matter."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, "").split():
            return super().find_class(module, name)
        if module == _MEGATRON[0] and name in _MEGATRON[1]:
            return _Plain
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype | torch.layout):
            return value
        raise ValueError(f"it names {module}.{name}")


@dataclass(frozen=True)
class StoredChunk:
    """A rectangle of a tensor, and where it lies."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class DistTensor:
    """A tensor of a torch_dist checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]


def read_raw_metadata(directory: Path) -> Metadata:
    """torch's own object, of the classes above only.

    Raises:
        ValueError: a file that is missing or damaged, or that names another class, by its name.
    """
    file = directory / METADATA_FILE
    if not file.is_file():
        raise ValueError(f"{directory} is no torch_dist checkpoint: it has no {METADATA_FILE}")
    try:
        with open(file, "rb") as stream:
            found: Metadata = _Unpickler(stream).load()
        if not isinstance(found.state_dict_metadata, dict) or not isinstance(found.storage_data, dict):
            raise ValueError("it describes no tensors")
    except ValueError as error:
        raise ValueError(
            f"{file} is a pickle that is not loaded: {error}, which no description of tensors needs"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{file} is damaged: {error!r}") from error
    return found


def read_metadata(directory: Path, raw: Metadata | None = None) -> dict[str, DistTensor]:
    """The tensors of a torch_dist checkpoint, by key; all else in it (steps, states of layers) is left out.

    Args:
        raw: torch's object, where it has been read already.

    Raises:
        ValueError: as above; or a tensor whose bytes do not lie in a file beside it, or beyond its end.
    """
    raw = raw or read_raw_metadata(directory)
    sizes: dict[str, int] = {}
    tensors = {}
    for key, stored in raw.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            chunks = tuple(_chunk(directory, key, chunk, raw.storage_data, sizes) for chunk in stored.chunks)
            tensors[key] = DistTensor(tuple(stored.size), stored.properties.dtype, chunks)
    return tensors


def _chunk(
    directory: Path, key: str, chunk: ChunkStorageMetadata, storage: dict[Any, Any], sizes: dict[str, int]
) -> StoredChunk:
    info = storage.get(MetadataIndex(key, chunk.offsets))
    if info is None:
        raise ValueError(f"{directory / METADATA_FILE} does not say where tensor {key} lies")
    name = info.relative_path
    if Path(name).name != name:
        raise ValueError(f"{directory / METADATA_FILE}: tensor {key} lies in {name}, outside of its folder")
    if name not in sizes:
        file = directory / name
        if not file.is_file():
            raise ValueError(f"{directory} is incomplete: {name} with tensor {key} is missing")
        sizes[name] = file.stat().st_size
    if info.offset + info.length > sizes[name]:
        raise ValueError(
            f"{directory / name} is truncated: tensor {key} ends at byte {info.offset + info.length}, the file at "
            f"{sizes[name]}"
        )
    return StoredChunk(tuple(chunk.offsets), tuple(chunk.sizes), name, info.offset, info.length)


def write_metadata(directory: Path, tensors: Iterable[tuple[str, DistTensor]]) -> None:
    """Write `.metadata`; the same tensors give the same bytes.

    Pickle writes a string again unless it is the same object, so equal ones are made one first.
    """
    known: dict[str, str] = {}
    described: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for name, tensor in tensors:
        key = known.setdefault(name, name)
        chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)) for chunk in tensor.chunks]
        described[key] = TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), chunks)
        for number, chunk in enumerate(tensor.chunks):
            index = MetadataIndex(key, torch.Size(chunk.offsets), number)
            storage[index] = _StorageInfo(known.setdefault(chunk.file, chunk.file), chunk.start, chunk.size)
    metadata = Metadata(described, planner_data=None, storage_data=storage)
    with open(directory / METADATA_FILE, "wb") as stream:
        pickle.dump(metadata, stream, protocol=4)
