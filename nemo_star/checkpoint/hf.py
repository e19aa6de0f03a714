"""Reading and writing Hugging Face checkpoint directories (safetensors, single or sharded)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
COMPANION_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)
"""Files beside the weights that a loader needs, kept at import and given back at export."""


class HFReader:
    """Lazy access to the tensors of a Hugging Face checkpoint: opening reads the headers only.

    Raises:
        ValueError: no directory, no config.json, no safetensors, a missing or truncated file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not directory.is_dir():
            raise ValueError(f"source {directory} does not exist or is not a directory")
        if not (directory / "config.json").is_file():
            raise ValueError(f"source {directory} is not a Hugging Face checkpoint: it has no config.json")
        self.values = self._read_values()
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._index: dict[str, str] = {}
        for name in self._weight_files():
            self._open(name)

    def __enter__(self) -> HFReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> Iterable[str]:
        return self._index.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._index[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the header alone; a ValueError for one that no model weight has."""
        stored = self._files[self._index[name]].get_slice(name).get_dtype()
        if stored not in DTYPES:
            file = self.directory / self._index[name]
            raise ValueError(f"{file}: tensor {name} is of type {stored}; supported: {', '.join(DTYPES)}")
        return DTYPES[stored]

    def get(self, name: str) -> Tensor:
        return self._files[self._index[name]].get_tensor(name)

    def file_of(self, name: str) -> str:
        return self._index[name]

    @property
    def architecture(self) -> str:
        """Name of the model class, e.g. LlamaForCausalLM."""
        named = self.values.get("architectures") or [f"an unnamed one, model_type {self.values.get('model_type')!r}"]
        return str(named[0])

    def _read_values(self) -> dict[str, Any]:
        file = self.directory / "config.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file} is not a model configuration: it holds no JSON object")
        return values

    def _weight_files(self) -> list[str]:
        index = self.directory / INDEX_FILE
        if index.is_file():
            try:
                return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} is damaged: {error!r}") from error
        if (self.directory / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        raise ValueError(
            f"source {self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}: only safetensors are read"
        )

    def _open(self, name: str) -> None:
        file = self.directory / name
        if not file.is_file():
            raise ValueError(f"source {self.directory} is incomplete: {name} is named by {INDEX_FILE} but missing")
        try:
            opened = self._stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged: {error}") from error
        self._files[name] = opened
        self._index.update(dict.fromkeys(opened.keys(), name))


def copy_companions(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer files; weights stay behind."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in COMPANION_PATTERNS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def write_config(directory: Path, values: dict[str, Any]) -> None:
    """config.json of a Hugging Face checkpoint."""
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_safetensors(directory: Path, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Write a stream of tensors as one file, or as numbered shards with an index; memory holds one shard."""
    shards: list[list[str]] = []
    total = 0
    for names, shard in _shards(tensors, max_shard_bytes):
        try:
            save_file(shard, directory / f"{len(shards)}.part", metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for instance
            raise OSError(f"cannot write to {directory}: {error}") from error
        shards.append(names)
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (directory / "0.part").rename(directory / SINGLE_FILE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.part").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(
    tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int
) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield list(shard), shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield list(shard), shard
