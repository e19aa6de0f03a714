"""Attention of a few query rows over the keys of one group, reading K and V once: plain Python that Numba compiles.

Tile by tile of tokens as FlashAttention (arXiv 2205.14135, algorithm 1), in powers of two: `scores_of` the tile's
tokens, `softmax` against the largest score so far, `accumulate` the weighted values. Four rows go together, so that
what is loaded is used four times; while a tile's scores are computed, its values and the next keys are asked for.

A vector of `scores_of` lies along the channels, and its lanes have to be added up in the end. Where there are rows
enough to fill one (several questions), `scores_of_many` has a lane for each row, and nothing is left to add up.

Imported when it is first needed: Numba takes half a second.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32, int16, njit, types, uint16
from numba.core.registry import cpu_target

from nemo_star.kernels.numba_vectors import (
    joins,
    larger,
    loads,
    plus_product,
    prefetch,
    splats,
    store,
    store_rows,
    store_turned,
)

LANES = 16 if "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2].split(",") else 8
"""Of the vectors in `scores_of`: sums of four rows and `TOKENS` tokens stay in registers, of which AVX-512 has twice as
many."""
TOKENS = LANES // 4
"""Tokens whose scores are computed together."""
MANY = 2 * LANES
"""Rows that fill the vectors in `scores_of_many`, of which the sums of `TURNED` tokens stay in registers."""
TURNED = 4
WIDE = 16
"""Lanes of the vectors in `accumulate`, which has no more sums than four rows'."""
TILE = 64
"""Tokens worked on at once."""
FLAGS = frozenset({"reassoc", "contract", "nsz", "arcp", "afn"})
"""Of fastmath, without those that take nan and infinity for impossible: a broken checkpoint must not look sound."""
STORED = {"float32": float32, "bfloat16": int16, "float16": uint16}
"""How K and V are given: the 16-bit types as integers of their bits, which `load` tells apart."""
LINE = 64
"""Bytes of a cache line."""

F32, I32 = np.float32, np.int32
ZERO, LOWEST, ROUND = F32(0.0), F32(-126.0), F32(1.5 * 2.0**23)
EXP2 = tuple(map(F32, (1.54035304e-4, 1.33335581e-3, 9.61812911e-3, 5.55041087e-2, 2.40226507e-1, 6.93147181e-1, 1.0)))
"""2**x for |x| <= 1/2, highest power first: the Taylor series of exp(x log 2), off by 1.2e-7 at most."""

_inlined = njit(fastmath=set(FLAGS), forceinline=True)
join_all, join_half, join4, join2 = joins(LANES), joins(LANES // 2), joins(4), joins(2)
load, splat, load_wide, splat_wide = loads(LANES), splats(LANES), loads(WIDE), splats(WIDE)
load_many, splat_many = loads(MANY), splats(MANY)


@njit(fastmath={"contract"}, forceinline=True)  # reassociated, ROUND would cancel out
def exp2(x):  # type: ignore[no-untyped-def]
    """2**x for x <= 0, at least 2**-126: a polynomial, and the whole part added to its exponent; nan stays."""
    x = x if not x < LOWEST else LOWEST
    shifted = x + ROUND
    rest = x - (shifted - ROUND)
    value = EXP2[0]
    for i in range(1, 7):
        value = value * rest + EXP2[i]
    return value * F32(I32((F32(shifted).view(I32) << I32(23)) + I32(0x3F800000)).view(F32))


@_inlined
def token_products(q, r, k, token, channels):  # type: ignore[no-untyped-def]
    """For rows r to r + 3 a quarter of the lanes each, whose sum is the row's score of a token."""
    s0 = s1 = s2 = s3 = splat(ZERO)
    for c in range(0, channels, LANES):
        x = load(k, token, c)
        s0 = plus_product(s0, load(q, r, c), x)
        s1 = plus_product(s1, load(q, r + 1, c), x)
        s2 = plus_product(s2, load(q, r + 2, c), x)
        s3 = plus_product(s3, load(q, r + 3, c), x)
    return join_half(join_all(s0, s2), join_all(s1, s3))


@_inlined
def two_tokens(q, r, k, token, channels):  # type: ignore[no-untyped-def]
    """Scores of rows r to r + 3 for this token and the next, row by row; eight lanes."""
    s1 = token_products(q, r, k, min(token + 1, k.shape[0] - 1), channels)
    return join2(token_products(q, r, k, token, channels), s1)


@_inlined
def four_tokens(q, r, k, token, channels):  # type: ignore[no-untyped-def]
    """The same for four tokens; sixteen lanes."""
    last = k.shape[0] - 1
    s0 = token_products(q, r, k, token, channels)
    s1 = token_products(q, r, k, min(token + 1, last), channels)
    s2 = token_products(q, r, k, min(token + 2, last), channels)
    s3 = token_products(q, r, k, min(token + 3, last), channels)
    return join2(join4(s0, s2), join4(s1, s3))


some_tokens = two_tokens if TOKENS == 2 else four_tokens


@_inlined
def scores_of(q, k, v, start, stop, scores, largest, rows, channels):  # type: ignore[no-untyped-def]
    """scores[rows, tile] of tokens start to stop; in each row of `largest` some numbers of which one is the largest."""
    for r in range(0, rows, 4):
        most = splat(-F32(np.inf))
        for token in range(start, stop, TOKENS):
            if r == 0:
                for byte in range(0, TOKENS * channels * k.itemsize, LINE):
                    prefetch(k, token + TILE, byte)
                    prefetch(v, token, byte)
            found = some_tokens(q, r, k, token, channels)
            store_rows(found, scores, r, token - start)
            most = larger(most, found)
        store_rows(most, largest, r, 0)


@_inlined
def scores_of_many(turned, keys, k, v, start, tokens, scores, largest, rows, channels):  # type: ignore[no-untyped-def]
    """The same of queries turned[channels, rows] and the tile's keys[tokens, channels] in float32."""
    for r in range(0, rows, MANY):
        most = splat_many(-F32(np.inf))
        for i in range(0, tokens, TURNED):
            if r == 0:
                for byte in range(0, TURNED * channels * k.itemsize, LINE):
                    prefetch(k, start + i + TILE, byte)
                    prefetch(v, start + i, byte)
            i1, i2, i3 = min(i + 1, tokens - 1), min(i + 2, tokens - 1), min(i + 3, tokens - 1)
            s0 = s1 = s2 = s3 = splat_many(ZERO)
            for c in range(channels):
                x = load_many(turned, c, r)
                s0 = plus_product(s0, splat_many(keys[i, c]), x)
                s1 = plus_product(s1, splat_many(keys[i1, c]), x)
                s2 = plus_product(s2, splat_many(keys[i2, c]), x)
                s3 = plus_product(s3, splat_many(keys[i3, c]), x)
            store_turned(s0, s1, s2, s3, scores, r, i)
            most = larger(most, larger(larger(s0, s1), larger(s2, s3)))
        store_turned(most, most, most, most, largest, r, 0)


@_inlined
def unpack(k, start, column, keys, tokens, channels):  # type: ignore[no-untyped-def]
    """keys[tokens, channels] = k from `start` and `column` on, as float32."""
    for i in range(tokens):
        for c in range(0, channels, WIDE):
            store(load_wide(k, start + i, column + c), keys, i, c)


@_inlined
def softmax(scores, largest, before, sums, out, tokens, rows, channels):  # type: ignore[no-untyped-def]
    """Scores to weights; sums and out shrunk from the largest score `before` to the largest now."""
    for r in range(rows):
        scores[r, tokens:] = -np.inf
        row, top = scores[r], before[r]
        for i in range(TOKENS):
            top = max(top, largest[r, i])
        total = ZERO
        for i in range(TILE):
            weight = exp2(row[i] - top)
            row[i] = weight
            total += weight
        factor = exp2(before[r] - top)
        before[r] = top
        sums[r] = sums[r] * factor + total
        for c in range(channels):
            out[r, c] *= factor


@_inlined
def accumulate(scores, v, start, stop, out, rows, channels):  # type: ignore[no-untyped-def]
    """out += weights @ values of tokens start to stop."""
    for r in range(0, rows, 4):
        for c in range(0, channels, WIDE):
            o0, o1 = load_wide(out, r, c), load_wide(out, r + 1, c)
            o2, o3 = load_wide(out, r + 2, c), load_wide(out, r + 3, c)
            for token in range(start, stop):
                i, x = token - start, load_wide(v, token, c)
                o0 = plus_product(o0, splat_wide(scores[r, i]), x)
                o1 = plus_product(o1, splat_wide(scores[r + 1, i]), x)
                o2 = plus_product(o2, splat_wide(scores[r + 2, i]), x)
                o3 = plus_product(o3, splat_wide(scores[r + 3, i]), x)
            store(o0, out, r, c)
            store(o1, out, r + 1, c)
            store(o2, out, r + 2, c)
            store(o3, out, r + 3, c)


def compiled(rows: int, channels: int, stored: str) -> Any:
    """`attend(q, k, v, out, lse)` for these sizes, as machine code, kept on disk for the next process.

    q, out [rows, channels] float32, q with scale and log2(e) multiplied in; k, v [tokens, channels] of
    `STORED[stored]`, tokens > 0; lse [rows] float32 in powers of two. `rows` is a multiple of 4, `channels` of 16.
    """
    are_many, are_floats = rows % MANY == 0, stored == "float32"

    def attend(q, k, v, out, lse):  # type: ignore[no-untyped-def]
        scores = np.empty((rows, TILE), np.float32)
        largest = np.empty((rows, TURNED), np.float32)
        before = np.full(rows, -np.inf, np.float32)
        sums = np.zeros(rows, np.float32)
        out[:] = 0
        turned = q.T.copy() if are_many else q
        unpacked = np.empty((TILE if are_many and not are_floats else 0, channels), np.float32)
        for start in range(0, k.shape[0], TILE):
            stop = min(start + TILE, k.shape[0])
            if not are_many:
                scores_of(q, k, v, start, stop, scores, largest, rows, channels)
            elif are_floats:
                scores_of_many(turned, k[start:stop], k, v, start, stop - start, scores, largest, rows, channels)
            else:
                unpack(k, start, 0, unpacked, stop - start, channels)
                scores_of_many(turned, unpacked, k, v, start, stop - start, scores, largest, rows, channels)
            softmax(scores, largest, before, sums, out, stop - start, rows, channels)
            accumulate(scores, v, start, stop, out, rows, channels)
        for r in range(rows):
            for c in range(channels):
                out[r, c] /= sums[r]
            lse[r] = before[r] + np.log2(sums[r])

    attend.__qualname__ = f"attend_{rows}_{channels}_{stored}"  # a name in the cache of its own
    kept = STORED[stored][:, ::1]
    return kept_on_disk(attend, types.void(float32[:, ::1], kept, kept, float32[:, ::1], float32[::1]))


def kept_on_disk(function: Any, given: Any) -> Any:
    """Compiled for what it is given, by this process or one before; without Python's lock."""
    work = njit(fastmath=set(FLAGS), nogil=True, error_model="numpy", cache=True)(function)
    try:
        work.compile(given)
    except OSError:  # no room on the disk to keep it for the next process
        if not work.signatures:
            raise
    return work
