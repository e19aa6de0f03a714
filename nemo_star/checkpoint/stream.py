"""A Megatron dist_checkpoint as a stream: written and read in one process, one tensor in memory at a time.

Megatron's own `dist_checkpointing.save` wants a built model, CUDA and all weights in memory, its `load` the whole of a
tensor stacked over layers. The format is torch's distributed checkpoint plus two small files, so conversion goes
through torch's planner interface: a tensor is made when it is its turn, a rectangle is read wherever chunks hold it.
Megatron's `dist_checkpointing.load` reads what is written here at any layout.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

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


class _StreamingPlanner(DefaultSavePlanner):
    """Plans the given chunks and makes each when the writer asks for it."""

    def __init__(self, chunks: Sequence[Chunk], on_written: Callable[[Chunk], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self._on_written = on_written

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(chunk) for chunk in self._chunks.values()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        index = write_item.index
        assert index.offset is not None
        chunk = self._chunks[index.fqn, tuple(index.offset)]
        tensor = chunk.make().reshape(chunk.shape).contiguous()
        assert tensor.dtype == chunk.dtype
        self._on_written(chunk)
        return tensor


def _write_item(chunk: Chunk) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(chunk.key, torch.Size(chunk.offsets)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.shape)),
            properties=TensorProperties(dtype=chunk.dtype),
            size=torch.Size(chunk.global_shape),
        ),
    )


def write_dist_checkpoint(
    directory: Path, chunks: Sequence[Chunk], *, on_written: Callable[[Chunk], None] = lambda chunk: None
) -> None:
    """Write `chunks`, which together must cover their tensors, as a torch_dist checkpoint that Megatron loads."""
    directory.mkdir(parents=True)
    planner = _StreamingPlanner(chunks, on_written)
    with _one_process():
        dcp.save({}, storage_writer=dcp.FileSystemWriter(directory), planner=planner, no_dist=True)
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


class DistCheckpointReader:
    """Shapes and parts of the tensors of a torch_dist checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._storage = dcp.FileSystemReader(directory)
        stored = self._storage.read_metadata().state_dict_metadata
        self.tensors = {key: value for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """The tensor `key`, or what lies at `index` of its first dimensions (layer, expert), in its stored type."""
        stored = self.tensors[key]
        shape = tuple(stored.size)[len(index) :]
        target = torch.empty(*(1 for _ in index), *shape, dtype=stored.properties.dtype)
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
