"""The merge of partial results as one Triton kernel (`merge.py` says what it computes).

Imported when it is first needed: Triton is there with torch's CUDA builds only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTIALS = 16
"""Partial results that are merged at once."""


@triton.jit(do_not_specialize=["partials"])
def merge_row(  # type: ignore[no-untyped-def]
    outs,
    lses,
    sinks,
    out,
    lse,
    partials,
    heads,
    outs_partial,
    outs_row,
    lses_partial,
    lses_row,
    channels: tl.constexpr,
    padded: tl.constexpr,
    at_once: tl.constexpr,
    has_sinks: tl.constexpr,
):
    """One row (token, batch, head) of `merge_with_sinks` a program, in one pass over its partial results."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, padded)
    largest = float("-inf")
    total = 0.0
    merged = tl.zeros([padded], tl.float32)
    for start in range(0, partials, at_once):
        partial = (start + tl.arange(0, at_once)).to(tl.int64)
        parts = tl.load(lses + partial * lses_partial + row * lses_row, mask=partial < partials, other=float("-inf"))
        top = tl.maximum(largest, tl.max(parts, 0))
        base = tl.where(top == float("-inf"), 0.0, top)  # all empty: any finite value gives the weights 0
        weights = tl.exp(parts - base)
        shrink = tl.exp(largest - base)
        # An empty partial's out is whatever its kernel left there: it is not read.
        filled = (parts != float("-inf"))[:, None] & (channel < channels)[None]
        place = partial[:, None] * outs_partial + row * outs_row + channel[None]
        values = tl.load(outs + place, mask=filled, other=0.0).to(tl.float32)
        total = total * shrink + tl.sum(weights, 0)
        merged = merged * shrink + tl.sum(weights[:, None] * values, 0)
        largest = top
    merged = merged / tl.where(total == 0.0, 1.0, total)
    whole = largest + tl.log(total)
    if has_sinks:
        merged = merged / (1.0 + tl.exp(tl.load(sinks + row % heads).to(tl.float32) - whole))
    tl.store(out + row * channels + channel, merged.to(out.dtype.element_ty), mask=channel < channels)
    tl.store(lse + row, whole)


def merge(outs: Tensor, lses: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`nemo_star.kernels.merge.merge_with_sinks` as one kernel; outs and lses may be views of one buffer."""
    partials, sq, b, heads, channels = outs.shape
    out = outs.new_empty((sq, b, heads, channels), dtype=dtype)
    lse = lses.new_empty((sq, b, heads))
    rows_of_outs, rows_of_lses = outs.flatten(1, 3), lses.flatten(1)
    merge_row[(sq * b * heads,)](
        rows_of_outs,
        rows_of_lses,
        lse if sinks is None else sinks,
        out,
        lse,
        partials,
        heads,
        *rows_of_outs.stride()[:2],
        *rows_of_lses.stride(),
        channels=channels,
        padded=triton.next_power_of_2(channels),
        at_once=min(PARTIALS, triton.next_power_of_2(partials)),
        has_sinks=sinks is not None,
        num_warps=1,
    )
    return out, lse
