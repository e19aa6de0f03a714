"""A Megatron dist_checkpoint as a stream: written and read in one process, one tensor in memory at a time.

Megatron's own `dist_checkpointing.save` wants a built model, CUDA and all weights in memory, its `load` the whole of a
tensor stacked over layers; torch's writer writes `.metadata` of all files at its end, so a conversion that was killed
could not go on. The format is torch's distributed checkpoint plus two small files: a `.distcp` file holds tensors one
after the other, each as `torch.save` writes it, and `.metadata` says which lies where. Megatron's
`dist_checkpointing.load` reads what is written here at any layout.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_star.checkpoint.metadata import (
    DistTensor,
    StoredChunk,
    read_metadata,
    read_raw_metadata,
    write_metadata,
)

_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What Megatron's `dist_checkpointing` asks metadata.json for (0.19 ignores the last two): written without Megatron,
whose import takes longer than converting a small checkpoint."""


@dataclass(frozen=True)
class Chunk:
    """A rectangle of one global tensor, and the function that makes it."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_chunks(stream: BinaryIO, chunks: Sequence[Chunk], on_written: Callable[[], None]) -> list[list[int]]:
    """The content of one `.distcp` file; returns [start, bytes] of each chunk in it."""
    places = []
    start = stream.tell()
    for chunk in chunks:
        tensor = chunk.make().reshape(chunk.shape)
        assert tensor.dtype == chunk.dtype
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != chunk.size:
            tensor = tensor.clone(memory_format=torch.contiguous_format)  # a view would be saved with all it views
        torch.save(tensor, stream)
        del tensor
        end = stream.tell()
        places.append([start, end - start])
        start = end
        on_written()
    return places


def finish_dist_checkpoint(directory: Path, written: Iterable[tuple[str, Sequence[Chunk], list[list[int]]]]) -> None:
    """Write what stands beside the `.distcp` files, given as (name, chunks, what `write_chunks` returned).

    The chunks together must cover their tensors.
    """
    chunks: dict[str, list[StoredChunk]] = {}
    tensors: dict[str, Chunk] = {}
    for file, group, places in written:
        for chunk, (start, size) in zip(group, places, strict=True):
            tensors.setdefault(chunk.key, chunk)
            chunks.setdefault(chunk.key, []).append(StoredChunk(chunk.offsets, chunk.shape, file, start, size))
    described = (
        (key, DistTensor(chunk.global_shape, chunk.dtype, tuple(chunks[key]))) for key, chunk in tensors.items()
    )
    describe_dist_checkpoint(directory, described)


def describe_dist_checkpoint(directory: Path, tensors: Iterable[tuple[str, DistTensor]]) -> None:
    """Write the files that make a torch_dist checkpoint of a folder of `.distcp` files."""
    write_metadata(directory, tensors)
    torch.save({}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_BACKENDS) + "\n", encoding="utf-8")


class _RectanglePlanner(DefaultLoadPlanner):
    """Reads one rectangle of one tensor, from whatever chunks hold it."""

    def __init__(self, key: str, offsets: tuple[int, ...], target: Tensor) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._key = key
        self._target = target
        self._rectangle = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=target.shape)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata[self._key]
        assert isinstance(stored, TensorStorageMetadata)
        return LoadPlan(create_read_items_for_chunk_list(self._key, stored, [self._rectangle]))

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: what `resolve_tensor` gave is a view of the target."""


class _Reader(dcp.FileSystemReader):
    """torch's, with a description that was read safely, and once."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._metadata = read_raw_metadata(directory)
        if getattr(self._metadata, "storage_meta", None) is None:
            self._metadata.storage_meta = StorageMeta()

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata


class DistCheckpointReader:
    """Shapes and parts of the tensors of a torch_dist checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._storage = _Reader(directory)
        self.tensors = read_metadata(directory, self._storage.read_metadata())

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """The tensor `key`, or what lies at `index` of its first dimensions (layer, expert), in its stored type."""
        stored = self.tensors[key]
        shape = stored.shape[len(index) :]
        target = torch.empty(*(1 for _ in index), *shape, dtype=stored.dtype)
        offsets = (*index, *(0 for _ in shape))
        with _one_process():
            dcp.load({}, storage_reader=self._storage, planner=_RectanglePlanner(key, offsets, target), no_dist=True)
        return target.view(shape)


@contextmanager
def _one_process() -> Iterator[None]:
    """One process is what is meant: torch need not warn of it, nor wrap what went wrong (in a BaseException)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            cause, _traceback = next(iter(error.failures.values()))
            raise cause from None
