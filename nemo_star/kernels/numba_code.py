"""Attention of a few query rows over the keys of one group, reading K and V once: plain Python that Numba compiles.

Tile by tile of tokens as FlashAttention (arXiv 2205.14135, algorithm 1), in powers of two: `scores` of the tile's
tokens, `softmax` against the largest score so far, `accumulate` the weighted values. Four rows or tokens go together,
so that what is loaded is used four times; the next tile is asked for while this one is worked on. 16-bit types are
widened as integers, in registers.

Imported when it is first needed: Numba takes half a second.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, int16, int32, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

TILE = 64
"""Tokens worked on at once."""
FLAGS = frozenset({"reassoc", "contract", "nsz", "arcp", "afn"})
"""Of fastmath, without those that take nan and infinity for impossible: a broken checkpoint must not look sound."""
FLOAT32, BFLOAT16, FLOAT16 = range(3)
"""How the bits of K and V are read."""
LINE = 64
"""Bytes of a cache line."""

F32, I32 = np.float32, np.int32
ZERO, LOWEST, ROUND = F32(0.0), F32(-126.0), F32(1.5 * 2.0**23)
EXP2 = tuple(map(F32, (1.54035304e-4, 1.33335581e-3, 9.61812911e-3, 5.55041087e-2, 2.40226507e-1, 6.93147181e-1, 1.0)))
"""2**x for |x| <= 1/2, highest power first: the Taylor series of exp(x log 2), off by 1.2e-7 at most."""

_inlined = njit(fastmath=set(FLAGS), forceinline=True)


@intrinsic
def prefetch(context: Any, rows: Any, row: Any, byte: Any) -> Any:
    """Ask for the cache line `byte` bytes into `rows[row]`; a place past the end does no harm."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        stride = cgutils.unpack_tuple(builder, array.strides)[0]
        data = builder.ptrtoint(array.data, ir.IntType(64))
        place = builder.add(builder.add(data, builder.mul(arguments[1], stride)), arguments[2])
        address = builder.inttoptr(place, ir.IntType(8).as_pointer())
        signature_of = ir.FunctionType(ir.VoidType(), [address.type] + [ir.IntType(32)] * 3)
        ask = cgutils.get_or_insert_function(builder.module, signature_of, "llvm.prefetch.p0")
        builder.call(ask, [address, *(ir.Constant(ir.IntType(32), value) for value in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(rows, types.int64, types.int64), emit


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
def widen(bits, stored):  # type: ignore[no-untyped-def]
    """The float32 of a stored element's bits."""
    if stored == FLOAT32:
        return I32(bits).view(F32)
    upper = I32(I32(bits) << I32(16))
    if stored == BFLOAT16:
        return upper.view(F32)
    size = I32((upper & I32(0x7FFFFFFF)) >> I32(3))
    size = size | I32(0x7F800000) if size >= I32(0x0F800000) else size  # infinity and nan stay what they are
    return I32(I32(F32(I32(size).view(F32) * F32(2.0**112)).view(I32)) | (upper & I32(-(2**31)))).view(F32)


@_inlined
def scores_of(q, k, start, stop, scores, largest, rows, channels, stored):  # type: ignore[no-untyped-def]
    """scores[rows, tile] of tokens start to stop; `largest` of each row brought up to date."""
    size = channels * (4 if stored == FLOAT32 else 2)
    for token in range(start, stop):
        key = k[token]
        for byte in range(0, size, LINE):
            prefetch(k, token + TILE, byte)
        i = token - start
        for r in range(0, rows, 4):
            q0, q1, q2, q3 = q[r], q[r + 1], q[r + 2], q[r + 3]
            s0 = s1 = s2 = s3 = ZERO
            for c in range(channels):
                x = widen(key[c], stored)
                s0 += q0[c] * x
                s1 += q1[c] * x
                s2 += q2[c] * x
                s3 += q3[c] * x
            scores[r, i], scores[r + 1, i], scores[r + 2, i], scores[r + 3, i] = s0, s1, s2, s3
    for r in range(rows):
        for i in range(stop - start):
            largest[r] = max(largest[r], scores[r, i])


@_inlined
def softmax(scores, largest, before, sums, out, tokens, rows, channels):  # type: ignore[no-untyped-def]
    """Scores to weights; sums and out shrunk from the largest score `before` to the largest now."""
    for r in range(rows):
        scores[r, tokens:] = -np.inf
        row, top = scores[r], largest[r]
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
def accumulate(scores, v, start, stop, out, rows, channels, stored):  # type: ignore[no-untyped-def]
    """out += weights @ values of tokens start to stop; past it, weights are 2**-126 and nothing new is read."""
    last = v.shape[0] - 1
    size = channels * (4 if stored == FLOAT32 else 2)
    for token in range(start, stop, 4):
        v0, v1, v2, v3 = v[token], v[min(token + 1, last)], v[min(token + 2, last)], v[min(token + 3, last)]
        for ahead in range(4):
            for byte in range(0, size, LINE):
                prefetch(v, token + ahead + TILE, byte)
        i = token - start
        for r in range(0, rows, 2):
            o, p = out[r], out[r + 1]
            a0, a1, a2, a3 = scores[r, i], scores[r, i + 1], scores[r, i + 2], scores[r, i + 3]
            b0, b1, b2, b3 = scores[r + 1, i], scores[r + 1, i + 1], scores[r + 1, i + 2], scores[r + 1, i + 3]
            for c in range(channels):
                x0, x1, x2, x3 = widen(v0[c], stored), widen(v1[c], stored), widen(v2[c], stored), widen(v3[c], stored)
                o[c] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                p[c] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3


def compiled(rows: int, channels: int, stored: int) -> Any:
    """`attend(q, k, v, out, lse)` for these sizes, as machine code, kept on disk for the next process.

    q, out [rows, channels] float32, q with scale and log2(e) multiplied in; k, v [tokens, channels], the bits of
    `stored` as integers, tokens > 0; lse [rows] float32 in powers of two. `rows` is a multiple of 4.
    """

    def attend(q, k, v, out, lse):  # type: ignore[no-untyped-def]
        scores = np.empty((rows, TILE), np.float32)
        largest = np.full(rows, -np.inf, np.float32)
        before = np.full(rows, -np.inf, np.float32)
        sums = np.zeros(rows, np.float32)
        out[:] = 0
        for start in range(0, k.shape[0], TILE):
            stop = min(start + TILE, k.shape[0])
            scores_of(q, k, start, stop, scores, largest, rows, channels, stored)
            softmax(scores, largest, before, sums, out, stop - start, rows, channels)
            accumulate(scores, v, start, stop, out, rows, channels, stored)
        for r in range(rows):
            for c in range(channels):
                out[r, c] /= sums[r]
            lse[r] = largest[r] + np.log2(sums[r])

    attend.__qualname__ = f"attend_{rows}_{channels}_{stored}"  # a name in the cache of its own
    work = njit(fastmath=set(FLAGS), nogil=True, error_model="numpy", cache=True)(attend)
    bits = int32 if stored == FLOAT32 else int16
    work.compile(types.void(float32[:, ::1], bits[:, ::1], bits[:, ::1], float32[:, ::1], float32[::1]))
    return work
