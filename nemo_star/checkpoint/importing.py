"""Hugging Face checkpoint -> converted checkpoint, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nemo_star.checkpoint.description import (
    FORMAT_VERSION,
    HF_FOLDER,
    WEIGHTS_FOLDER,
    CheckpointDescription,
    describe_files,
    write_description,
)
from nemo_star.checkpoint.directory import new_directory, refuse_existing
from nemo_star.checkpoint.hf import HFReader, Source, copy_companions, read_config, write_config
from nemo_star.checkpoint.language_part import language_part
from nemo_star.checkpoint.quantized import dequantized
from nemo_star.checkpoint.source import fingerprint
from nemo_star.checkpoint.stream import Chunk, finish_dist_checkpoint, write_chunks
from nemo_star.checkpoint.work import Part, convert
from nemo_star.config.model import ModelConfig
from nemo_star.models.families import families
from nemo_star.models.families.family import Family
from nemo_star.models.families.weights import Place, Weight

MAX_FILE_BYTES = 2**30
"""Of a weight file: what a killed conversion may have to do again. A tensor that is larger has a file of its own."""


@dataclass(frozen=True)
class ImportPlan:
    """All that is known of an import before a tensor is read: from config.json and the headers of the weights."""

    reader: Source
    model: ModelConfig
    chunks: tuple[Chunk, ...]
    """One after the other as they are written."""

    @property
    def dtype(self) -> str:
        """Of most weights, as they will be stored."""
        [(dtype, _)] = Counter(chunk.dtype for chunk in self.chunks).most_common(1)
        return str(dtype).removeprefix("torch.")

    def description(self) -> CheckpointDescription:
        """Of the checkpoint to be, without its files."""
        return CheckpointDescription(FORMAT_VERSION, self.reader.architecture, self.dtype, self.model, {})


def plan_import(source: Path, dtype: torch.dtype | None = None) -> ImportPlan:
    """Read config.json and headers.

    Raises:
        ValueError: another architecture or quantization, missing, truncated, unknown or ill-shaped tensors.
    """
    reader = language_part(dequantized(HFReader(source), dtype))
    family = family_of(reader.architecture, source)
    model = family.model_config(reader.values)
    return ImportPlan(reader, model, tuple(_chunks(reader, model, family, dtype)))


def family_of(architecture: str, source: Path) -> Family:
    """The family of an architecture; a ValueError where there is none."""
    family = families().get(architecture)
    if family is None:
        raise ValueError(f"source {source} is of architecture {architecture}; supported: {', '.join(families())}")
    return family


@dataclass(frozen=True)
class ImportJob:
    """An import, for any process."""

    source: Path
    dtype: str | None
    file_bytes: int

    @contextmanager
    def parts(self) -> Iterator[Sequence[Part]]:
        yield self.parts_of(self.plan())

    def plan(self) -> ImportPlan:
        return plan_import(self.source, getattr(torch, self.dtype) if self.dtype else None)

    def parts_of(self, plan: ImportPlan) -> list[Part]:
        return [
            Part(
                file=f"{WEIGHTS_FOLDER}/__0_{number}.distcp",
                size=sum(chunk.size for chunk in group),
                tensors=len(group),
                write=lambda stream, on_tensor, group=group: write_chunks(stream, group, on_tensor),  # type: ignore[misc]
            )
            for number, group in enumerate(_groups(plan.chunks, self.file_bytes))
        ]


def import_checkpoint(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    *,
    processes: int = 1,
    wait: bool = False,
) -> CheckpointDescription:
    """Convert the Hugging Face checkpoint `source` into `target`, which must not exist.

    An import that was killed goes on after the last complete file, and gives the same bytes.

    Args:
        dtype: type to store; None keeps the stored one, tensor by tensor, and makes bfloat16 of quantized ones.
        processes: that read and write at the same time, each one file and one tensor of it.
        wait: for another process that converts into `target`, instead of refusing.

    Raises:
        ValueError: another architecture or quantization, missing, truncated, unknown or ill-shaped tensors, too little
            space, an existing target; before anything is written.
    """
    refuse_existing(target)
    job = ImportJob(source, None if dtype is None else str(dtype).removeprefix("torch."), MAX_FILE_BYTES)
    plan = job.plan()
    parts = job.parts_of(plan)
    with new_directory(target, wait=wait) as working:
        identity = fingerprint(source, "import", job.dtype or "")
        written = convert(job, parts, working, identity=identity, processes=processes, label="import")
        names = [Path(part.file).name for part in parts]
        notes = [record.note for record in written]
        finish_dist_checkpoint(
            working / WEIGHTS_FOLDER, zip(names, _groups(plan.chunks, job.file_bytes), notes, strict=True)
        )
        _write_companions(plan, working / HF_FOLDER, changed=dtype is not None)
        known = {name: record.sha256 for name, record in zip(names, written, strict=True)}
        description = describe_files(working, plan.description(), known)
        write_description(working, description)
    return description


def _write_companions(plan: ImportPlan, folder: Path, *, changed: bool) -> None:
    """Configuration and tokenizer; `changed` says that the source stores another type."""
    source = plan.reader.directory
    copy_companions(source, folder)
    values = dict(plan.reader.values)
    stored = read_config(source)
    if changed or values != stored:
        if changed or "quantization_config" in stored:
            # transformers 4 says torch_dtype, 5 dtype
            values["dtype" if "dtype" in values else "torch_dtype"] = plan.dtype
        write_config(folder, values)


def _groups(chunks: Sequence[Chunk], file_bytes: int) -> list[list[Chunk]]:
    """Chunks of each weight file."""
    groups: list[list[Chunk]] = []
    size = 0
    for chunk in chunks:
        if not groups or size + chunk.size > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(chunk)
        size += chunk.size
    return groups


def _chunks(reader: Source, model: ModelConfig, family: Family, dtype: torch.dtype | None) -> Iterator[Chunk]:
    """Every tensor of the mapping table as chunks of the dist_checkpoint, shapes checked from the headers."""
    present, known = set(reader.names()), set[str]()
    for weight in family.weights(model):
        for place in weight.places(model):
            known.update(place.hf_names)
            stored = _check_tensors(reader, present, list(place.hf_names), weight.shapes(model))
            wanted = None if weight.keeps_type else dtype
            yield from _chunks_of(reader, place, weight, model, stored=stored, wanted=wanted)
    refuse_unknown(
        reader,
        [name for name in reader.names() if name not in known and not family.is_ignored(name, model)],
    )


def refuse_unknown(reader: Source, names: Iterable[str]) -> None:
    """A ValueError for tensors that the architecture does not have."""
    if unknown := sorted(names):
        raise ValueError(
            f"source {reader.directory} holds {len(unknown)} tensors that {reader.architecture} does not have, "
            f"the first {unknown[0]} (in {reader.file_of(unknown[0])})"
        )


def _chunks_of(
    reader: Source, place: Place, weight: Weight, model: ModelConfig, *, stored: torch.dtype, wanted: torch.dtype | None
) -> Iterator[Chunk]:
    """What is made of the tensors of one place: one chunk, or one for each expert that they hold."""
    shape = weight.shape(model)
    experts = shape[0] if weight.holds_experts else None
    parts = _Parts(reader, place.hf_names, experts)
    for expert in (None,) if experts is None else range(experts):
        index, rest = (place.index, shape) if expert is None else ((*place.index, expert), shape[1:])
        yield Chunk(
            key=place.key,
            global_shape=(*place.counts, *shape),
            offsets=(*index, *(0 for _ in rest)),
            shape=(*(1 for _ in index), *rest),
            dtype=wanted or stored,
            make=partial(_make, parts, expert, weight, model, wanted),
        )


class _Parts:
    """Hugging Face tensors that chunks are made of. Those of several experts are read for the first that is asked for,
    and kept until the last has been made: chunks are made one after the other, so these are the only ones in memory."""

    def __init__(self, reader: Source, names: tuple[str, ...], experts: int | None) -> None:
        self._reader, self._names, self._experts = reader, names, experts
        self._kept: list[Tensor] = []

    def of(self, expert: int | None) -> list[Tensor]:
        """All, or the part of one expert, as a first dimension of one."""
        parts = self._kept or [self._reader.get(name) for name in self._names]
        if self._experts is None or expert is None:
            return parts
        self._kept = [] if expert == self._experts - 1 else parts
        return [part[expert : expert + 1] for part in parts]


def _make(parts: _Parts, expert: int | None, weight: Weight, model: ModelConfig, dtype: torch.dtype | None) -> Tensor:
    joined = weight.join(parts.of(expert), model)
    return joined if dtype is None else joined.to(dtype)


def _check_tensors(
    reader: Source, present: Collection[str], names: list[str], shapes: tuple[tuple[int, ...], ...]
) -> torch.dtype:
    """The common type of the named tensors; a ValueError where one is missing or has another shape or type."""
    dtypes = {}
    for name, shape in zip(names, shapes, strict=True):
        if name not in present:
            raise ValueError(f"source {reader.directory} is incomplete: tensor {name} is missing")
        if reader.shape(name) != shape:
            raise ValueError(
                f"source {reader.directory}: tensor {name} has shape {reader.shape(name)}, config.json asks for "
                f"{shape} (in {reader.file_of(name)})"
            )
        dtypes[name] = reader.dtype(name)
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"source {reader.directory}: tensors stored together differ in type: {dtypes}; give --dtype")
    return dtypes[names[0]]
