"""A checkpoint of NeMo 2, Megatron-Bridge or Megatron-LM -> converted checkpoint, its weights where they lie.

The weight files are links; beside them stands a description of our own in which keys have no prefix and tensors no
rows that pad the vocabulary, without the state of training. So everything that reads a converted checkpoint reads it,
Megatron's `dist_checkpointing.load` included, and what Megatron would unpickle (`.metadata`, `common.pt`) is ours.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nemo_star.checkpoint.description import (
    FORMAT_VERSION,
    HF_FOLDER,
    WEIGHTS_FOLDER,
    CheckpointDescription,
    describe_files,
    write_description,
)
from nemo_star.checkpoint.directory import check_space, empty, new_directory, refuse_existing
from nemo_star.checkpoint.hf import architecture_of, copy_companions, read_config, write_config
from nemo_star.checkpoint.importing import family_of
from nemo_star.checkpoint.megatron import MegatronCheckpoint, check_settings
from nemo_star.checkpoint.metadata import DistTensor, StoredChunk, read_metadata
from nemo_star.checkpoint.stream import describe_dist_checkpoint
from nemo_star.checkpoint.verify import checksums
from nemo_star.config.model import ModelConfig
from nemo_star.models.families.weights import Weight, each_layer_named

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_OF_THE_MODEL = ("decoder.", "embedding.", "output_layer.", "mtp.")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def adopt_checkpoint(
    found: MegatronCheckpoint, target: Path, hf_config: Path | None, *, copy: bool = False
) -> CheckpointDescription:
    """Make the converted checkpoint `target`, which must not exist, around the weights of `found`.

    Args:
        hf_config: folder with config.json (and tokenizer files) of the Hugging Face model; None: the one that the
            checkpoint names, where it is a folder.
        copy: copy the weight files instead of linking to them.

    Raises:
        ValueError: no configuration, or one that the checkpoint's own settings or shapes contradict; a tensor that is
            missing, unknown, ill-shaped or truncated, by name; a pickle in place of a description.
    """
    refuse_existing(target)
    folder = _hf_folder(found, hf_config)
    values = {name: value for name, value in read_config(folder).items() if name != "quantization_config"}
    family = family_of(architecture_of(values), folder)
    model = family.model_config(values)
    check_settings(found, model)
    stored = read_metadata(found.weights)
    prefix = _prefix(found.weights, stored)
    table, unstacked = list(family.weights(model)), False
    if f"{prefix}decoder.layers.0.{_first_of_layer(table)}" in stored and not model.layers_differ:
        table, unstacked = each_layer_named(table), True
    tensors = {key: _tensor(found.weights, stored, prefix, key, shape) for key, shape in _wanted(table, model)}
    _refuse_unknown(found.weights, stored, prefix, {*tensors, *((_HEAD,) if _is_tied(model) else ())})
    [(dtype, _)] = Counter(tensor.dtype for tensor in tensors.values()).most_common(1)
    name = str(dtype).removeprefix("torch.")
    description = CheckpointDescription(FORMAT_VERSION, family.architecture, name, model, {}, unstacked=unstacked)
    with new_directory(target) as working:
        empty(working)
        digests = _take_files(found.weights, tensors, working / WEIGHTS_FOLDER, copy=copy)
        describe_dist_checkpoint(working / WEIGHTS_FOLDER, tensors.items())
        _write_companions(working / HF_FOLDER, values, name, (folder, found.tokenizer))
        description = describe_files(working, description, digests)
        write_description(working, description)
    return description


def _hf_folder(found: MegatronCheckpoint, given: Path | None) -> Path:
    named = Path(found.hf_model) if found.hf_model else None
    for folder in (given, named):
        if folder is not None and (folder / "config.json").is_file():
            return folder
        if folder is not None and folder is given:
            raise ValueError(f"--hf-config {given} has no config.json: give a folder with that of the model")
    says = f"; the checkpoint was made from {found.hf_model}" if found.hf_model else ""
    raise ValueError(
        f"a checkpoint of {found.kind} does not say all that config.json does: give --hf-config DIR, a folder with "
        f"config.json and tokenizer files of the Hugging Face model{says}"
    )


def _is_tied(model: ModelConfig) -> bool:
    return model.share_embeddings_and_output_weights


def _prefix(weights: Path, stored: Mapping[str, DistTensor]) -> str:
    """What stands before all keys of the model: `module.` in NeMo 2."""
    for key in stored:
        if key.endswith(_EMBEDDING) and not key.startswith(("optimizer", "chained_")):
            return key.removesuffix(_EMBEDDING)
    raise ValueError(
        f"{weights} holds no tensor {_EMBEDDING}, with or without a prefix; its first are "
        f"{', '.join(sorted(stored)[:3]) or 'none at all'}"
    )


def _first_of_layer(table: Iterable[Weight]) -> str:
    key = next(weight.key for weight in table if weight.key.startswith("decoder.layers."))
    return key.removeprefix("decoder.layers.").removeprefix("{layer}.")


def _wanted(table: Iterable[Weight], model: ModelConfig) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Each key with the shape of the whole tensor."""
    found = {}
    for weight in table:
        for place in weight.places(model):
            found[place.key] = (*place.counts, *weight.shape(model))
    return found.items()


def _tensor(
    weights: Path, stored: Mapping[str, DistTensor], prefix: str, key: str, shape: tuple[int, ...]
) -> DistTensor:
    """The stored tensor without padding, checked; its chunks are where they were."""
    tensor = stored.get(prefix + key)
    if tensor is None:
        raise ValueError(f"{weights} is incomplete: tensor {prefix}{key} is missing")
    where = f"{weights / tensor.chunks[0].file if tensor.chunks else weights}: tensor {prefix}{key}"
    padded = key in (_EMBEDDING, _HEAD) and tensor.shape[0] >= shape[0] and tensor.shape[1:] == shape[1:]
    if tensor.shape != shape and not padded:
        raise ValueError(f"{where} has shape {tensor.shape}, config.json asks for {shape}")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{where} is of type {tensor.dtype}; supported: {', '.join(map(str, _DTYPES))}")
    chunks = tuple(cropped for chunk in tensor.chunks if (cropped := _cropped(chunk, shape[0])) is not None)
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"{where} is incomplete: parts of it are in no file")
    return DistTensor(shape, tensor.dtype, chunks)


def _cropped(chunk: StoredChunk, rows: int) -> StoredChunk | None:
    """What of a chunk is in the first `rows`; a reader reads the part of a stored tensor that the description names."""
    count = min(chunk.shape[0], rows - chunk.offsets[0])
    return replace(chunk, shape=(count, *chunk.shape[1:])) if count > 0 else None


def _refuse_unknown(weights: Path, stored: Mapping[str, DistTensor], prefix: str, known: set[str]) -> None:
    """Of the model itself; what training keeps beside it is left behind."""
    for key, tensor in stored.items():
        name = key.removeprefix(prefix)
        ours = key.startswith(prefix) and name.startswith(_OF_THE_MODEL) and "_extra_state" not in name
        if ours and name not in known:
            file = tensor.chunks[0].file if tensor.chunks else "no file"
            raise ValueError(f"{weights} holds tensor {key} (in {file}), which the model of config.json does not have")


def _take_files(weights: Path, tensors: Mapping[str, DistTensor], target: Path, *, copy: bool) -> dict[str, str]:
    """Links to (or copies of) the files that the tensors lie in, and their checksums."""
    names = sorted({chunk.file for tensor in tensors.values() for chunk in tensor.chunks})
    files = [(weights / name).resolve() for name in names]
    target.mkdir()
    if copy:
        check_space(target, sum(file.stat().st_size for file in files))
    for name, file in zip(names, tqdm(files, desc="copy", unit="file", disable=not copy), strict=True):
        if copy:
            shutil.copyfile(file, target / name)
        else:
            (target / name).symlink_to(file)
    return dict(zip(names, checksums(files, "checksums"), strict=True))


def _write_companions(target: Path, values: dict[str, Any], dtype: str, folders: Iterable[Path | None]) -> None:
    for folder in folders:
        if folder is not None:
            copy_companions(folder, target, replace=False)
    values["dtype" if "dtype" in values else "torch_dtype"] = dtype
    write_config(target, values)
