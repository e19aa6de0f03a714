"""Attention of a few query rows over cached keys, as a Triton kernel.

It is flash-decoding (Dao, Haziza, Massa, Sizov 2023, https://pytorch.org/blog/flash-decoding/): a program takes a
stretch of the keys for all query heads of a group and all tokens that ask, so that K and V are read once; within it,
tile by tile as FlashAttention-2 (arXiv 2307.08691, algorithm 1). The stretches are partial results, merged as those of
ranks are. A kernel has more arguments than a function elsewhere may have: there are no objects that it could take.

Imported when it is first needed: Triton is there with torch's CUDA builds only.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_star.kernels.triton_merge import merge

ROWS = (16, 32, 64)
"""Rows of a tile: query heads of a group, of all tokens. The first is the least that a matrix product takes; above 128
dimensions the last does not fit."""
MIN_STRETCH = 512
"""Keys of a program at least: what a query and an answer cache is one program's, without a merge. Not measured."""
BYTES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
"""K/V that are read as bytes, and what makes numbers of them."""


@triton.jit
def widened(x, stored: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cached numbers in the query's type; of bytes exactly, in registers."""
    if stored == "e4m3":
        x = x.to(tl.float8e4nv, bitcast=True)
    elif stored == "e5m2":
        x = (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True)  # it is float16 without its lower half
    elif stored == "e4m3 bits":
        # GPUs before 8.9 have no such type. Moved to float16's place, its exponent is 8 too small.
        bits = x.to(tl.uint16)
        moved = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        x = tl.where((bits & 0x7F) == 0x7F, float("nan"), moved.to(tl.float32) * 256.0)
    return x.to(dtype)


@triton.jit(do_not_specialize=["sq", "sk", "keys"])
def attend_stretch(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    outs,
    lses,
    sq,
    sk,
    keys,
    log2_scale,
    q_token,
    q_batch,
    q_head,
    k_token,
    k_batch,
    k_group,
    v_token,
    v_batch,
    v_group,
    groups: tl.constexpr,
    group: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    rows_tile: tl.constexpr,
    keys_tile: tl.constexpr,
    causal: tl.constexpr,
    stored: tl.constexpr,
):
    """outs [stretches, sq, b, np, hn], lses [stretches, sq, b, np] float32, of `keys` keys a program.

    Axes of the grid: tiles of rows, batch and group, stretches. `group`: query heads of one; `log2_scale`: scale *
    log2(e); strides in elements. Lengths are not specialized: a token must not compile.
    """
    batch, own_group = (tl.program_id(1) // groups).to(tl.int64), tl.program_id(1) % groups
    row = tl.program_id(0) * rows_tile + tl.arange(0, rows_tile)
    token, head = row // group, own_group * group + row % group
    channel = tl.arange(0, padded)
    here = (token < sq)[:, None] & (channel < channels)[None]
    q += batch * q_batch + token.to(tl.int64)[:, None] * q_token + head[:, None] * q_head + channel[None]
    query = tl.load(q, mask=here, other=0.0)
    k += batch * k_batch + own_group.to(tl.int64) * k_group
    v += batch * v_batch + own_group.to(tl.int64) * v_group

    first = tl.program_id(2) * keys
    stop = tl.minimum(first + keys, sk)
    seen = tl.zeros([rows_tile], tl.int32) + sk
    if causal:
        seen = sk - sq + token + 1
        stop = tl.minimum(stop, sk - sq + (tl.program_id(0) * rows_tile + rows_tile - 1) // group + 1)
    largest = tl.full([rows_tile], float("-inf"), tl.float32)
    total = tl.zeros([rows_tile], tl.float32)
    out = tl.zeros([rows_tile, padded], tl.float32)
    for start in range(first, stop, keys_tile):
        key = start + tl.arange(0, keys_tile)
        there = (key < stop)[:, None] & (channel < channels)[None]
        place = key.to(tl.int64)[:, None]
        key_rows = widened(tl.load(k + place * k_token + channel[None], mask=there, other=0), stored, query.dtype)
        scores = tl.dot(query, tl.trans(key_rows), input_precision="ieee") * log2_scale
        visible = (key < stop)[None] & (key[None] < seen[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        top = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # no key yet: any finite value gives the weights 0
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        values = widened(tl.load(v + place * v_token + channel[None], mask=there, other=0), stored, query.dtype)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(query.dtype), values, input_precision="ieee")
        largest = top

    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = (largest + tl.log2(total)) * 0.6931471805599453  # without keys -inf + -inf
    # Rows of the result, [stretches, sq, b, np] one behind the other.
    place = (tl.program_id(2).to(tl.int64) * sq + token) * (tl.num_programs(1) // groups) + batch
    place = place * (groups * group) + head
    tl.store(outs + place[:, None] * channels + channel[None], out, mask=here)
    tl.store(lses + place, lse, mask=token < sq)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool, programs: int, has_e4m3: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of a few tokens over cached keys, sk > 0; shapes and results as `decode` of the registry.

    Args:
        k, v: of q's type, or one of `BYTES`.
        programs: that the device runs at once.
        has_e4m3: whether it converts float8_e4m3fn by itself (compute capability 8.9).
    """
    sq, b, heads, channels = q.shape
    groups = k.shape[2]
    rows = sq * heads // groups
    rows_tile, keys_tile = tile(rows, channels)
    tiles = triton.cdiv(rows, rows_tile)
    keys = stretch(k.shape[0], keys_tile, programs // (tiles * b * groups))
    stretches = triton.cdiv(k.shape[0], keys)
    outs = q.new_empty((stretches, *q.shape), dtype=torch.float32)
    lses = q.new_empty((stretches, *q.shape[:-1]), dtype=torch.float32)
    stored = BYTES.get(k.dtype, "same")
    if stored != "same":
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    attend_stretch[(tiles, b * groups, stretches)](
        q,
        k,
        v,
        outs,
        lses,
        sq,
        k.shape[0],
        keys,
        scale * math.log2(math.e),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        groups=groups,
        group=heads // groups,
        channels=channels,
        padded=padded_to(channels),
        rows_tile=rows_tile,
        keys_tile=keys_tile,
        causal=causal and sq > 1,
        stored="e4m3 bits" if stored == "e4m3" and not has_e4m3 else stored,
    )
    return (outs[0], lses[0]) if stretches == 1 else merge(outs, lses, None, torch.float32)


def padded_to(channels: int) -> int:
    """A head dimension that a matrix product takes."""
    return max(16, int(triton.next_power_of_2(channels)))


def tile(rows: int, channels: int) -> tuple[int, int]:
    """(rows, keys) of a tile: with three stages of K and V at most 90 KiB of shared memory (99 KiB from Ampere on),
    114 KiB on Hopper."""
    most = 64 if padded_to(channels) <= 128 else 32
    return next((size for size in ROWS if rows <= size <= most), most), most


def stretch(keys: int, keys_tile: int, programs: int) -> int:
    """Keys of one program where about so many share them, in whole tiles."""
    each = max(MIN_STRETCH, triton.cdiv(keys, max(1, programs)))
    return int(triton.cdiv(each, keys_tile)) * keys_tile
