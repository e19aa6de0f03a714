"""torch_dist checkpoints by torch's own writer, as Megatron saves them: chunks of tensors, and bytes."""

import io
import json
import warnings

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType


class _Planner(DefaultSavePlanner):
    def __init__(self, tensors, parts, objects):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._parts, self._objects = tensors, parts, objects

    def create_local_plan(self):
        items = [
            WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO, tensor_data=None) for key in self._objects
        ]
        for key, tensor in self._tensors.items():
            for start, size in self._chunks(key, tensor):
                items.append(
                    WriteItem(
                        index=MetadataIndex(key, torch.Size(start)),
                        type=WriteItemType.SHARD,
                        tensor_data=TensorWriteData(
                            chunk=ChunkStorageMetadata(torch.Size(start), torch.Size(size)),
                            properties=TensorProperties(dtype=tensor.dtype),
                            size=tensor.shape,
                        ),
                    )
                )
        self.plan = SavePlan(items)
        return self.plan

    def _chunks(self, key, tensor):
        """Layer by layer, the dimension of tensor parallelism in parts."""
        layers = range(tensor.shape[0]) if tensor.dim() > 1 and "layers" in key else [None]
        for layer in layers:
            shape = list(tensor.shape) if layer is None else [1, *tensor.shape[1:]]
            start = [0] * tensor.dim()
            dim = 0
            if layer is not None:
                start[0] = layer
                dim = 1
            if shape[dim] % self._parts:
                yield start, shape
                continue
            shape[dim] //= self._parts
            for part in range(self._parts):
                yield [*start[:dim], part * shape[dim], *start[dim + 1 :]], shape

    def resolve_data(self, write_item):
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        part = self._tensors[write_item.index.fqn]
        chunk = write_item.tensor_data.chunk
        for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            part = part.narrow(dim, start, size)
        return part.clone(memory_format=torch.contiguous_format)


def save_torch_dist(folder, tensors, *, parts=1, objects=None, common=None):
    """Write `tensors` (key -> tensor) and `objects` (key -> bytes) as Megatron does, with its two small files.

    Args:
        parts: of each tensor, as many tensor-parallel ranks would save it.
        common: content of common.pt.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.save(
            {},
            storage_writer=dcp.FileSystemWriter(folder),
            planner=_Planner(tensors, parts, objects or {}),
            no_dist=True,
        )
    torch.save(common or {}, folder / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(
        json.dumps(backends | {"common_backend": "torch", "common_backend_version": 1})
    )
