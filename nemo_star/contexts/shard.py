"""One safetensors file of K/V: written tensor by tensor without a copy of all, read row by row.

Reading goes through the memory mapping of safetensors: a rank at another layout wants some rows and heads of several
files, and takes just these into its cache with one copy. Measured against reading files into memory first
(BENCHMARKS.md, "A context from disk").
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int32: "I32",
}
_PIECE_BYTES = 2**26
"""Of a tensor, copied at once to be written."""


class Written(NamedTuple):
    """What a file came to."""

    size: int
    sha256: str


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write a new safetensors file, down to the disk; tensors may be strided views, on any device.

    Raises:
        OSError: it exists, or the disk is full.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    found = hashlib.sha256(start)
    with file.open("xb") as output:
        output.write(start)
        for tensor in tensors.values():
            rows = max(1, _PIECE_BYTES // max(1, tensor[:1].nbytes))
            for piece in tensor.split(rows) if tensor.numel() else ():
                content = piece.contiguous().cpu().view(torch.uint8).numpy()
                output.write(content)
                found.update(content)
        output.flush()
        os.fsync(output.fileno())
    return Written(len(start) + offset, found.hexdigest())


def checksum(file: Path) -> str:
    """sha256 of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def open_tensors(file: Path, size: int) -> Any:
    """A safetensors file of this size, mapped, to be entered: `.get_slice(name)[rows, groups]` reads a part.

    Raises:
        ValueError: it is missing, truncated or damaged.
    """
    if not file.is_file():
        raise ValueError(
            f"{file} is missing: the saved context is incomplete, or its folder is not one that all machines of this "
            "job share"
        )
    if file.stat().st_size != size:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, should have {size}: the saved context is damaged")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error})") from error
