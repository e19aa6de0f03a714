"""Writing a Megatron dist_checkpoint as a stream: one tensor in memory at a time.

Megatron's own `dist_checkpointing.save` wants a built model, CUDA and all weights in memory. The format is torch's
distributed checkpoint plus two small files, so it is written here through torch's planner interface, each tensor made
only when it is its turn. Megatron's `dist_checkpointing.load` reads the result at any layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType


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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
        dcp.save({}, storage_writer=dcp.FileSystemWriter(directory), planner=planner, no_dist=True)
    torch.save({}, directory / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
