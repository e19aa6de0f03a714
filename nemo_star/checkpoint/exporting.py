"""Converted checkpoint -> Hugging Face checkpoint, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from nemo_star.checkpoint.description import HF_FOLDER, WEIGHTS_FOLDER, CheckpointDescription, read_description
from nemo_star.checkpoint.directory import new_directory, refuse_existing
from nemo_star.checkpoint.hf import INDEX_FILE, SINGLE_FILE, copy_companions
from nemo_star.checkpoint.safetensors_file import TensorToWrite, write_file
from nemo_star.checkpoint.source import fingerprint
from nemo_star.checkpoint.stream import DistCheckpointReader
from nemo_star.checkpoint.work import Part, convert
from nemo_star.config.model import ModelConfig
from nemo_star.models.families import families
from nemo_star.models.families.weights import Place, Weight, each_layer_named

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ExportJob:
    """An export, for any process."""

    source: Path
    shard_bytes: int

    @contextmanager
    def parts(self) -> Iterator[Sequence[Part]]:
        yield [
            Part(
                file=file,
                size=sum(tensor.size for tensor in shard),
                tensors=len(shard),
                write=lambda stream, on_tensor, shard=shard: write_file(stream, shard, on_tensor),  # type: ignore[misc]
            )
            for file, shard in self.shards().items()
        ]

    def shards(self) -> dict[str, list[TensorToWrite]]:
        """File -> tensors."""
        shards: list[list[TensorToWrite]] = [[]]
        size = 0
        for tensor in self._tensors():
            if shards[-1] and size + tensor.size > self.shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += tensor.size
        if len(shards) == 1:
            return {SINGLE_FILE: shards[0]}
        count = len(shards)
        return {f"model-{number:05d}-of-{count:05d}.safetensors": shard for number, shard in enumerate(shards, start=1)}

    def _tensors(self) -> Iterator[TensorToWrite]:
        """The Hugging Face tensors of the dist_checkpoint, in the order of the mapping table."""
        description = read_description(self.source)
        model = description.model
        reader = _LastRead(DistCheckpointReader(self.source / WEIGHTS_FOLDER), model)
        table = families()[description.architecture].weights(model)
        for weight in each_layer_named(table) if description.unstacked else table:
            shapes = weight.shapes(model)
            for place in weight.places(model):
                dtype = reader.reader.tensors[place.key].dtype
                for number, (name, shape) in enumerate(zip(place.hf_names, shapes, strict=True)):
                    yield TensorToWrite(name, dtype, shape, partial(reader.part, place, weight, number))


class _LastRead:
    """What one stored tensor is split into is needed one after the other."""

    def __init__(self, reader: DistCheckpointReader, model: ModelConfig) -> None:
        self.reader = reader
        self._model = model
        self._place: Place | None = None
        self._parts: list[Tensor] = []

    def part(self, place: Place, weight: Weight, number: int) -> Tensor:
        if self._place is not place:
            self._parts.clear()  # before the next one is read
            self._place = place
            self._parts = list(weight.split(self.reader.read(place.key, place.index), self._model))
        return self._parts[number]


def export_checkpoint(source: Path, target: Path, *, processes: int = 1) -> CheckpointDescription:
    """Write the converted checkpoint `source` as a Hugging Face checkpoint `target`, which must not exist.

    An export that was killed goes on after the last complete file, and gives the same bytes.

    Args:
        processes: that read and write at the same time, each one file.

    Raises:
        ValueError: a damaged source, too little space, an existing target.
    """
    refuse_existing(target)
    description = read_description(source)
    job = ExportJob(source, MAX_SHARD_BYTES)
    with job.parts() as parts, new_directory(target) as working:
        identity = fingerprint(source, fingerprint(source / WEIGHTS_FOLDER), "export")
        convert(job, parts, working, identity=identity, processes=processes, label="export")
        copy_companions(source / HF_FOLDER, working)
        if len(parts) > 1:
            _write_index(working, job.shards())
    return description


def _write_index(directory: Path, shards: dict[str, list[TensorToWrite]]) -> None:
    total = sum(tensor.size for shard in shards.values() for tensor in shard)
    weight_map = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
