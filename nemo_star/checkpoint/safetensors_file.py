"""Safetensors files, read and written tensor by tensor.

The format is 8 bytes of header length, a JSON header, and the tensors' bytes one after the other. The library maps a
file into memory, so that a process that goes through a checkpoint holds all of it, and writes a file from tensors that
are all in memory; here a process holds the tensor that it is at. (https://github.com/huggingface/safetensors)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,  # exponents, whose type torch has since 2.7
    "U8": torch.uint8,
}
"""What is read, by the header's names."""
_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "BOOL": 1, "F8_E5M2": 1}
_NOT_COUNTED = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")
"""Further types of the format."""
_ITEM_BYTES |= {name: dtype.itemsize for name, dtype in DTYPES.items()}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's entry in the header of a file."""

    file: Path
    dtype: str
    """As the header says, e.g. BF16."""
    shape: tuple[int, ...]
    start: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
        ValueError: a file that is truncated, damaged, or none of safetensors, by the tensor where it knows one.
    """
    total = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if total < 8 or length > min(MAX_HEADER_BYTES, total - 8):
            raise ValueError(f"{file} is truncated or damaged, or no safetensors file: it has no header")
        text = stream.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        tensors = {name: _entry(file, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is truncated or damaged: its header cannot be read ({error})") from error
    _check_layout(file, tensors, 8 + length, total)
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands in it twice")
    return values


def _entry(file: Path, values: dict[str, Any], data: int) -> StoredTensor:
    if set(values) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"an entry has the fields {', '.join(sorted(values))}")
    (start, end), shape, dtype = values["data_offsets"], tuple(values["shape"]), values["dtype"]
    if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
        raise ValueError("a size is no natural number")
    if dtype not in _ITEM_BYTES and dtype not in _NOT_COUNTED:
        raise ValueError(f"a type is {dtype!r}")
    return StoredTensor(file, str(dtype), shape, data + start, end - start)


def _check_layout(file: Path, tensors: dict[str, StoredTensor], start: int, total: int) -> None:
    """Tensors follow each other without gaps, each as long as its shape and type say, to the end of the file."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        item = _ITEM_BYTES.get(tensor.dtype)
        if item is not None and math.prod(tensor.shape) * item != tensor.size:
            raise ValueError(
                f"{file} is truncated or damaged: tensor {name} of shape {tensor.shape} and type {tensor.dtype} takes "
                f"{tensor.size} bytes in it, should take {math.prod(tensor.shape) * item}"
            )
        if tensor.start != start:
            raise ValueError(f"{file} is truncated or damaged: tensor {name} starts at {tensor.start}, not at {start}")
        start += tensor.size
        if start > total:
            raise ValueError(f"{file} is truncated or damaged: tensor {name} ends at byte {start}, the file at {total}")
    if start != total:
        raise ValueError(f"{file} is truncated or damaged: it has {total} bytes, its tensors end at {start}")


def read_tensor(stored: StoredTensor) -> Tensor:
    """The tensor, of a type in `DTYPES`, through no mapping: its pages would stay in this process."""
    tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    if tensor.numel():
        view = _bytes(tensor)
        with open(stored.file, "rb", buffering=0) as stream:
            stream.seek(stored.start)
            while len(view):
                count = stream.readinto(view)  # at most 2 GB at once on Linux
                if not count:
                    raise ValueError(f"{stored.file} is truncated: it ends within a tensor")
                view = view[count:]
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    """Of a contiguous tensor, not copied."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor that `make` gives when it is its turn."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(stream: BinaryIO, tensors: Sequence[TensorToWrite], on_written: Callable[[], None]) -> None:
    """Write a file of `tensors`, wider types first as the library does, so that each is aligned."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.size
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered:
        made = tensor.make().contiguous()
        assert made.dtype == tensor.dtype, tensor.name
        assert tuple(made.shape) == tensor.shape, tensor.name
        stream.write(_bytes(made))
        on_written()
