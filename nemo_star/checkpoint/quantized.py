"""Quantized Hugging Face checkpoints, read as if they were not: FP8 with scales, and the MXFP4 experts of gpt-oss.

FP8 (transformers' `fp8`, as DeepSeek V3 and Ministral 3 are published): X.weight in F8_E4M3 and X.weight_scale_inv that
multiplies it, one for each block or one for all of it; `activation_scale` is for matrices multiplied in FP8 and not
read. MXFP4 (OCP Microscaling 1.0): X_blocks [E, rows, groups, 16] hold two 4-bit values a byte, low half first, and
X_scales [E, rows, groups] the exponent of each 32 of them; X is [E, 32 groups, rows], as transformers has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_star.checkpoint.hf import HFReader, Source

_SCALES = (".weight_scale_inv", ".weight_scale")
_UNREAD = (*_SCALES, ".activation_scale", ".input_scale")
"""Tensors of an FP8 checkpoint that are no weights."""
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_EXPONENT_BIAS = 127


def dequantized(reader: HFReader, dtype: torch.dtype | None) -> Source:
    """The checkpoint in `dtype` (None: bfloat16) where its config.json says that it is quantized; else as it is.

    Raises:
        ValueError: another quantization than fp8 and mxfp4, by name; a scale that is missing or does not fit.
    """
    settings = _settings(reader.values)
    if settings is None:
        return reader
    method, wanted = settings.get("quant_method"), dtype or torch.bfloat16
    if method == "fp8" and settings.get("expert_dtype", "fp8") == "fp8":
        return FP8Source(reader, settings.get("weight_block_size"), wanted)
    if method == "mxfp4":
        return MXFP4Source(reader, wanted)
    raise ValueError(
        f"source {reader.directory}: config.json: quantization by quant_method={method!r} is not supported, only fp8 "
        "and mxfp4: take the checkpoint that was quantized"
    )


def _settings(values: dict[str, Any]) -> dict[str, Any] | None:
    """`quantization_config`, of the whole or of the language model inside."""
    inside = values.get("text_config")
    return values.get("quantization_config") or (inside.get("quantization_config") if inside else None)


class _Dequantized:
    """A `Source` over a quantized one; which tensors are quantized is for the classes below."""

    def __init__(self, whole: HFReader, wanted: torch.dtype) -> None:
        self.directory: Path = whole.directory
        self.architecture: str = whole.architecture
        self._whole = whole
        self._wanted = wanted
        self.values = {name: value for name, value in whole.values.items() if name != "quantization_config"}
        if isinstance(text := self.values.get("text_config"), dict):
            self.values["text_config"] = {k: value for k, value in text.items() if k != "quantization_config"}

    def _stored(self, name: str) -> str:
        """The quantized tensor behind a name."""
        raise NotImplementedError

    def _is_quantized(self, name: str) -> bool:
        raise NotImplementedError

    def dtype(self, name: str) -> torch.dtype:
        return self._wanted if self._is_quantized(name) else self._whole.dtype(name)

    def file_of(self, name: str) -> str:
        return self._whole.file_of(self._stored(name) if self._is_quantized(name) else name)


class FP8Source(_Dequantized):
    """Weights in FP8, and what multiplies them."""

    def __init__(self, whole: HFReader, block_size: Sequence[int] | None, wanted: torch.dtype) -> None:
        super().__init__(whole, wanted)
        self._block = block_size
        present = set(whole.names())
        self._scales = {}
        for name in present:
            if whole.stored_type(name) == "F8_E4M3":
                self._scales[name] = self._find_scale(name, present)
        self._names = [name for name in whole.names() if not name.endswith(_UNREAD)]

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._whole.shape(name)

    def get(self, name: str) -> Tensor:
        weight = self._whole.get(name)
        if not self._is_quantized(name):
            return weight
        return dequantize_fp8(weight, self._read_scale(self._scales[name]), self._block).to(self._wanted)

    def _stored(self, name: str) -> str:
        return name

    def _is_quantized(self, name: str) -> bool:
        return name in self._scales

    def _find_scale(self, name: str, present: set[str]) -> str:
        """The scale's name, its shape checked."""
        where = f"{self.directory / self._whole.file_of(name)}: tensor {name} is of type F8_E4M3"
        scale = next((s for end in _SCALES if (s := name.removesuffix(".weight") + end) in present), None)
        if scale is None:
            raise ValueError(f"{where}, and its scale {name}_scale_inv is missing")
        shape, given = self._whole.shape(name), self._whole.shape(scale)
        wanted: tuple[int, ...] = ()
        if self._block is not None and len(shape) == 2:
            wanted = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=True))
        if math.prod(given) != 1 and given != wanted:
            raise ValueError(f"{where}, and its scale {scale} has shape {given}, should have {wanted}")
        return scale

    def _read_scale(self, name: str) -> Tensor:
        scale = self._whole.get(name)
        if scale.dtype == torch.uint8:  # exponents alone
            return (scale.float() - _EXPONENT_BIAS).exp2()
        return scale.float()


def dequantize_fp8(weight: Tensor, scale: Tensor, block_size: Sequence[int] | None) -> Tensor:
    """`weight` [rows, columns] times the scale of its block, in float32.

    Args:
        scale: [ceil(rows / block_size[0]), ceil(columns / block_size[1])] float32, or of one element.
    """
    result = weight.float()
    if scale.numel() == 1:
        return result.mul_(scale.reshape(()))
    assert block_size is not None
    height, width = block_size
    for row in range(scale.shape[0]):  # a row of blocks at once: scales by column would be as large as the weight
        factors = scale[row].repeat_interleave(width)[: weight.shape[1]]
        result[row * height : (row + 1) * height].mul_(factors)
    return result


class MXFP4Source(_Dequantized):
    """Experts in MXFP4."""

    def __init__(self, whole: HFReader, wanted: torch.dtype) -> None:
        super().__init__(whole, wanted)
        present = set(whole.names())
        self._packed = {name.removesuffix("_blocks") for name in present if name.endswith("_blocks")}
        for name in sorted(self._packed):
            self._check(name, present)
        rest = [name for name in whole.names() if name.removesuffix("_blocks").removesuffix("_scales") == name]
        self._names = [*rest, *sorted(self._packed)]

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return self._whole.shape(name)
        experts, rows, groups, size = self._whole.shape(f"{name}_blocks")
        return (experts, groups * size * 2, rows)

    def get(self, name: str) -> Tensor:
        if name not in self._packed:
            return self._whole.get(name)
        blocks, scales = self._whole.get(f"{name}_blocks"), self._whole.get(f"{name}_scales")
        return dequantize_mxfp4(blocks, scales, self._wanted)

    def _stored(self, name: str) -> str:
        return f"{name}_blocks"

    def _is_quantized(self, name: str) -> bool:
        return name in self._packed

    def _check(self, name: str, present: set[str]) -> None:
        blocks, scales = f"{name}_blocks", f"{name}_scales"
        where = f"{self.directory / self._whole.file_of(blocks)}: tensor {blocks}"
        if scales not in present:
            raise ValueError(f"{where} is there, and its {scales} is missing")
        shape, given = self._whole.shape(blocks), self._whole.shape(scales)
        if len(shape) != 4 or given != shape[:-1]:
            raise ValueError(f"{where} has shape {shape} and {scales} {given}: should be [E, rows, groups, 16] and 3")
        if {self._whole.stored_type(blocks), self._whole.stored_type(scales)} - {"U8", "F8_E8M0"}:
            raise ValueError(f"{where} is of type {self._whole.stored_type(blocks)}, should be U8")


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Experts [E, rows, groups, 16] of two values a byte and exponents [E, rows, groups], uint8, as [E, columns, rows].

    Expert by expert: what lies between is several times as large as the result.
    """
    experts, rows, groups, size = blocks.shape
    table = torch.tensor(_FP4_VALUES, dtype=dtype)
    result = torch.empty(experts, groups * size * 2, rows, dtype=dtype)
    for expert in range(experts):
        packed = blocks[expert].reshape(rows * groups, size)
        values = torch.stack([table[(packed & 15).int()], table[(packed >> 4).int()]], dim=-1)
        exponents = scales[expert].reshape(-1, 1).int() - _EXPONENT_BIAS
        result[expert] = torch.ldexp(values.view(rows * groups, size * 2), exponents).view(rows, -1).T
    return result
