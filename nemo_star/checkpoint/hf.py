"""Reading Hugging Face checkpoint directories (safetensors, single or sharded), and the files beside their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_star.checkpoint.safetensors_file import DTYPES, StoredTensor, read_header, read_tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_TYPES = ("F32", "BF16", "F16")
"""Of a model's weights, in the words of a safetensors header."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
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


class Source(Protocol):
    """Tensors by the names of a Hugging Face checkpoint: of `HFReader`, or of what stands between it and a family."""

    directory: Path
    values: dict[str, Any]
    """Of config.json."""

    @property
    def architecture(self) -> str: ...
    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def get(self, name: str) -> Tensor: ...
    def file_of(self, name: str) -> str: ...


class HFReader:
    """Lazy access to the tensors of a Hugging Face checkpoint: opening reads the headers only.

    Raises:
        ValueError: no directory, no config.json, no safetensors, a missing, truncated or damaged file, a tensor that
            the index and the files do not agree on.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not directory.is_dir():
            raise ValueError(f"source {directory} does not exist or is not a directory")
        if not (directory / "config.json").is_file():
            raise ValueError(f"source {directory} is not a Hugging Face checkpoint: it has no config.json")
        self.values = read_config(directory)
        self._index = self._read_index()
        self._tensors: dict[str, StoredTensor] = {}
        for name in sorted(set(self._index.values())) if self._index else [SINGLE_FILE]:
            self._open(name)
        for name, file in self._index.items():
            if name not in self._tensors:
                raise ValueError(
                    f"source {directory} is incomplete: tensor {name} is missing in {file}, where {INDEX_FILE} has it"
                )

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def stored_type(self, name: str) -> str:
        """As the safetensors header says, e.g. BF16 or F8_E4M3."""
        return self._tensors[name].dtype

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the header alone; a ValueError for one that no model weight has."""
        stored = self._tensors[name]
        if stored.dtype not in WEIGHT_TYPES:
            raise ValueError(
                f"{stored.file}: tensor {name} is of type {stored.dtype}; supported: {', '.join(WEIGHT_TYPES)}"
            )
        return DTYPES[stored.dtype]

    def get(self, name: str) -> Tensor:
        return read_tensor(self._tensors[name])

    def file_of(self, name: str) -> str:
        return self._tensors[name].file.name

    @property
    def architecture(self) -> str:
        """Name of the model class, e.g. LlamaForCausalLM."""
        return architecture_of(self.values)

    def _read_index(self) -> dict[str, str]:
        """Tensor -> file; empty where there is one file."""
        index = self.directory / INDEX_FILE
        if index.is_file():
            try:
                weights = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                if any(Path(file).name != file for file in weights.values()):
                    raise ValueError("it names files of other folders")
                return weights
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} is damaged: {error!r}") from error
        if (self.directory / SINGLE_FILE).is_file():
            return {}
        found = sorted(file.name for pattern in PICKLES for file in self.directory.glob(pattern))
        pickled = f"; {found[0]} is a pickle, which could run anything, and is not loaded" if found else ""
        raise ValueError(
            f"source {self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}: only safetensors are read{pickled}"
        )

    def _open(self, name: str) -> None:
        file = self.directory / name
        if not file.is_file():
            raise ValueError(f"source {self.directory} is incomplete: {name} is named by {INDEX_FILE} but missing")
        for tensor, stored in read_header(file).items():
            if tensor in self._tensors:
                raise ValueError(
                    f"source {self.directory}: tensor {tensor} is in {self._tensors[tensor].file.name} and in {name}"
                )
            self._tensors[tensor] = stored


def architecture_of(values: dict[str, Any]) -> str:
    """What a config.json names its model class; words that say so where it does not."""
    named = values.get("architectures") or [f"an unnamed one, model_type {values.get('model_type')!r}"]
    return str(named[0])


def read_config(directory: Path) -> dict[str, Any]:
    """Values of a config.json.

    Raises:
        ValueError: no JSON object.
    """
    file = directory / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a model configuration: it holds no JSON object")
    return values


def copy_companions(source: Path, target: Path, *, replace: bool = True) -> None:
    """Copy configuration and tokenizer files, in place of those in `target` or only the others; weights stay behind."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in COMPANION_PATTERNS:
        for file in source.glob(pattern):
            if file.is_file() and (replace or not (target / file.name).exists()):
                shutil.copyfile(file, target / file.name)


def write_config(directory: Path, values: dict[str, Any]) -> None:
    """config.json of a Hugging Face checkpoint."""
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
