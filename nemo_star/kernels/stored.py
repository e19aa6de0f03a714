"""K and V in the type that the cache stores, where that is not the one a kernel computes in: fp8.

They are written by a saturating cast with scale 1, as vLLM does without calibration (docs/features/quantization/
quantized_kvcache.md, "default scales"; csrc/quantization/w8a8/fp8/nvidia/quant_utils.cuh, `__NV_SATFINITE`). A kernel
that names the type in `narrow` reads them as they are. For any other they are converted to the type of the queries
before it runs, a piece at a time, so that a long cache is never there in the wider type, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nemo_star.kernels.merge import merge_partials
from nemo_star.kernels.registry import Kernel

_FP8 = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""Names of `cache.dtype` that torch has others for."""
PIECE_BYTES = {"cpu": 2**23, "cuda": 2**28}
"""Of K and V in the queries' type, at once. A GPU's pieces are larger: each takes a dozen launches."""


def stored_type(name: str) -> torch.dtype:
    """The type called `name` in `cache.dtype`.

    Raises:
        ValueError: this torch does not have it.
    """
    found = getattr(torch, _FP8.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(
            f"cache.dtype={name} needs a torch that has torch.{_FP8.get(name, name)}, and {torch.__version__} has not: "
            "install a later one, or give cache.dtype=bfloat16"
        )
    return found


def stored_name(dtype: torch.dtype) -> str:
    """What `cache.dtype` calls it."""
    name = str(dtype).removeprefix("torch.")
    return next((ours for ours, theirs in _FP8.items() if theirs == name), name)


def is_fp8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def computed_type(stored: torch.dtype, model: torch.dtype) -> torch.dtype:
    """The type that decode attention computes in: the cache's, but the model's where that is fp8."""
    return model if is_fp8(stored) else stored


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x`, ready to be copied into a tensor of this type: for fp8 nothing is beyond the largest value, 448 or 57,344.
    Whether torch's cast saturates differs between releases and devices; nan stays nan."""
    if not is_fp8(dtype) or x.dtype == dtype:
        return x
    most = torch.finfo(dtype).max
    return x.clamp(-most, most)


def reads(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Whether a kernel takes K and V of this type beside queries of another: its `narrow`, if it has one."""
    return dtype in getattr(kernel, "narrow", ())


def told(kernel: Kernel, stored: torch.dtype) -> str:
    """The type of cached K and V, and what becomes of it in decode, for a person."""
    if not is_fp8(stored):
        return stored_name(stored)
    return f"{stored_name(stored)} ({'read as stored' if reads(kernel, stored) else f'converted for {kernel.name}'})"


def attend_stored(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The kernel's `decode` over K and V as the cache has them; shapes as in `nemo_star.kernels.registry`.

    Args:
        q: of the model's type.
        k, v: of the cache's type.
    """
    if not is_fp8(k.dtype):
        return kernel.decode(q.to(k.dtype), k, v, scale, causal)
    if reads(kernel, k.dtype):
        return kernel.decode(q, k, v, scale, causal)

    def over(start: int, stop: int) -> tuple[Tensor, Tensor]:
        keys, values = (converted(x[start:stop], q.dtype) for x in (k, v))
        return kernel.decode(q, keys, values, scale, causal and stop == k.shape[0])

    first, *others = _pieces(q, k, causal)
    out, lse = over(*first)
    for piece in others:
        outs, lses = zip((out, lse), over(*piece), strict=True)
        out, lse = merge_partials(torch.stack(outs), torch.stack(lses))
    return out, lse


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """K or V [tokens, b, ng, hn] in another type, in the same order in memory: on CPU the tokens of a group lie one
    behind the other, and of a part of a tensor `.to` does not promise to keep that."""
    if x.stride(0) < x.stride(2):
        return x.permute(1, 2, 0, 3).to(dtype).permute(2, 0, 1, 3)
    return x.to(dtype)


def _pieces(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[int, int]]:
    """Keys [start, stop) one after the other; where `causal`, the queries' own are all in the last piece."""
    tokens, own = k.shape[0], q.shape[0] if causal else 0
    size = max(1, PIECE_BYTES[k.device.type] // (2 * math.prod(k.shape[1:]) * q.dtype.itemsize))
    start = 0
    while tokens - start > max(size, own):
        stop = min(start + size, tokens - own)
        yield start, stop
        start = stop
    yield start, tokens
