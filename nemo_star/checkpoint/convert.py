"""Hugging Face checkpoint <-> converted checkpoint, tensor by tensor."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nemo_star.checkpoint.description import (
    FORMAT_VERSION,
    HF_FOLDER,
    WEIGHTS_FOLDER,
    CheckpointDescription,
    read_description,
    write_description,
)
from nemo_star.checkpoint.hf import HFReader, copy_companions, write_config, write_safetensors
from nemo_star.checkpoint.language_part import LanguagePart, Source, language_part
from nemo_star.checkpoint.stream import Chunk, DistCheckpointReader, write_dist_checkpoint
from nemo_star.config.model import ModelConfig
from nemo_star.models.families import families
from nemo_star.models.families.family import Family
from nemo_star.models.families.weights import Place, Weight

MAX_SHARD_BYTES = 5 * 10**9


def import_checkpoint(source: Path, target: Path, dtype: torch.dtype | None = None) -> CheckpointDescription:
    """Convert the Hugging Face checkpoint `source` into `target`, which must not exist.

    Args:
        dtype: type to store; None keeps the stored one, tensor by tensor.

    Raises:
        ValueError: another architecture, missing, truncated, unknown or ill-shaped tensors; before anything is written.
    """
    with HFReader(source) as whole:
        reader = language_part(whole)
        family = families().get(reader.architecture)
        if family is None:
            raise ValueError(
                f"source {source} is of architecture {reader.architecture}; supported: {', '.join(families())}"
            )
        model = family.model_config(reader.values)
        chunks = list(_chunks(reader, model, family, dtype))
        with _new_directory(target) as working:
            return _write(reader, model, chunks, working, changed=dtype is not None)


def export_checkpoint(source: Path, target: Path) -> CheckpointDescription:
    """Write the converted checkpoint `source` as a Hugging Face checkpoint `target`, which must not exist."""
    description = read_description(source)
    with _new_directory(target) as working:
        copy_companions(source / HF_FOLDER, working)
        tensors = _hf_tensors(source / WEIGHTS_FOLDER, description)
        write_safetensors(working, tqdm(tensors, desc="export", unit="tensor"), MAX_SHARD_BYTES)
    return description


def _write(
    reader: Source, model: ModelConfig, chunks: list[Chunk], working: Path, *, changed: bool
) -> CheckpointDescription:
    """Fill the directory of a converted checkpoint; `changed` says that the source stores another type."""
    with tqdm(total=len(chunks), desc="import", unit="tensor") as bar:
        write_dist_checkpoint(working / WEIGHTS_FOLDER, chunks, on_written=lambda _: bar.update())
    copy_companions(reader.directory, working / HF_FOLDER)
    if isinstance(reader, LanguagePart):
        write_config(working / HF_FOLDER, reader.values)
    dtypes = [chunk.dtype for chunk in chunks]
    stored = _name(max(dtypes, key=dtypes.count))
    if changed:
        _set_config_dtype(working / HF_FOLDER / "config.json", stored)
    files = sorted(file for file in (working / WEIGHTS_FOLDER).iterdir() if file.is_file())
    description = CheckpointDescription(
        format_version=FORMAT_VERSION,
        architecture=reader.architecture,
        dtype=stored,
        model=model,
        weight_files={file.name: file.stat().st_size for file in files},
    )
    write_description(working, description)
    return description


def _chunks(reader: Source, model: ModelConfig, family: Family, dtype: torch.dtype | None) -> Iterator[Chunk]:
    """Every tensor of the mapping table as chunks of the dist_checkpoint, shapes checked from the headers."""
    known: set[str] = set()
    for weight in family.weights(model):
        for place in weight.places(model):
            known.update(place.hf_names)
            yield from _chunks_of(reader, place, weight, model, None if weight.keeps_type else dtype)
    unknown = sorted(name for name in reader.names() if name not in known and not family.is_ignored(name, model))
    if unknown:
        raise ValueError(
            f"source {reader.directory} holds {len(unknown)} tensors that {reader.architecture} does not have, "
            f"the first {unknown[0]} (in {reader.file_of(unknown[0])})"
        )


def _chunks_of(
    reader: Source, place: Place, weight: Weight, model: ModelConfig, dtype: torch.dtype | None
) -> Iterator[Chunk]:
    """What is made of the tensors of one place: one chunk, or one for each expert that they hold."""
    shape = weight.shape(model)
    stored = _check_tensors(reader, list(place.hf_names), weight.shapes(model))
    experts = shape[0] if weight.holds_experts else None
    parts = _Parts(reader, place.hf_names, experts)
    for expert in (None,) if experts is None else range(experts):
        index, rest = (place.index, shape) if expert is None else ((*place.index, expert), shape[1:])
        yield Chunk(
            key=place.key,
            global_shape=(*place.counts, *shape),
            offsets=(*index, *(0 for _ in rest)),
            shape=(*(1 for _ in index), *rest),
            dtype=dtype or stored,
            make=partial(_make, parts, expert, weight, model, dtype),
        )


class _Parts:
    """Hugging Face tensors that chunks are made of. Those of several experts are read for the first, and kept until the
    last has been made: chunks are made one after the other, so that they are the only ones in memory."""

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


def _check_tensors(reader: Source, names: list[str], shapes: tuple[tuple[int, ...], ...]) -> torch.dtype:
    """The common type of the named tensors; a ValueError where one is missing or has another shape or type."""
    present = set(reader.names())
    dtypes = {}
    for name, shape in zip(names, shapes, strict=True):
        if name not in present:
            raise ValueError(f"source {reader.directory} is incomplete: tensor {name} is missing")
        if reader.shape(name) != shape:
            raise ValueError(
                f"source {reader.directory}: tensor {name} has shape {reader.shape(name)}, config.json asks for {shape}"
            )
        dtypes[name] = reader.dtype(name)
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"source {reader.directory}: tensors stored together differ in type: {dtypes}; give --dtype")
    return dtypes[names[0]]


def _hf_tensors(weights: Path, description: CheckpointDescription) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of a dist_checkpoint, layer by layer."""
    reader = DistCheckpointReader(weights)
    model = description.model
    for weight in families()[description.architecture].weights(model):
        for place in weight.places(model):
            parts = weight.split(reader.read(place.key, place.index), model)
            yield from zip(place.hf_names, parts, strict=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _set_config_dtype(file: Path, dtype: str) -> None:
    """A conversion that changes the type says so in config.json (transformers 4: torch_dtype, 5: dtype)."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values["dtype" if "dtype" in values else "torch_dtype"] = dtype
    write_config(file.parent, values)


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """A working directory beside `target` that takes its name when all went well, and is removed when not."""
    if target.exists():
        raise ValueError(f"target {target} exists: give a new directory or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield working
        working.chmod(0o755)  # mkdtemp's is private
        working.rename(target)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
