"""Products of a few rows with a matrix, reading it once: plain Python that Numba compiles.

Eight of the matrix's rows go with eight rows of the other operand, one lane for each: their sums stay in registers. A
tile's rows go through the cache `CHUNK` channels at a time, so that they are still there for the next eight.

Imported when it is first needed: Numba takes half a second.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32, int64, njit, types

from nemo_star.kernels.numba_code import FLAGS, STORED, kept_on_disk, unpack
from nemo_star.kernels.numba_vectors import loads, plus, plus_product, splats, store, store_turned

EIGHT = 8
"""Rows of the matrix, and of the other operand, that go together."""
CHUNK = 256
"""Channels that are added up by themselves: the fewer, the less is lost by rounding."""

F32 = np.float32

load, splat = loads(EIGHT), splats(EIGHT)
_inlined = njit(fastmath=set(FLAGS), forceinline=True)


@_inlined
def add_products(x, base, weight, first, column, channels, sums, r):  # type: ignore[no-untyped-def]
    """sums[0 : 8, r : r + 8] += eight rows of the weight, from `first` and `column` on, times x[base : ...]."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = splat(F32(0.0))
    for c in range(channels):
        rows = load(x, base + c, 0)
        s0 = plus_product(s0, splat(weight[first, column + c]), rows)
        s1 = plus_product(s1, splat(weight[first + 1, column + c]), rows)
        s2 = plus_product(s2, splat(weight[first + 2, column + c]), rows)
        s3 = plus_product(s3, splat(weight[first + 3, column + c]), rows)
        s4 = plus_product(s4, splat(weight[first + 4, column + c]), rows)
        s5 = plus_product(s5, splat(weight[first + 5, column + c]), rows)
        s6 = plus_product(s6, splat(weight[first + 6, column + c]), rows)
        s7 = plus_product(s7, splat(weight[first + 7, column + c]), rows)
    store(plus(load(sums, 0, r), s0), sums, 0, r)
    store(plus(load(sums, 1, r), s1), sums, 1, r)
    store(plus(load(sums, 2, r), s2), sums, 2, r)
    store(plus(load(sums, 3, r), s3), sums, 3, r)
    store(plus(load(sums, 4, r), s4), sums, 4, r)
    store(plus(load(sums, 5, r), s5), sums, 5, r)
    store(plus(load(sums, 6, r), s6), sums, 6, r)
    store(plus(load(sums, 7, r), s7), sums, 7, r)


def compiled(stored: str) -> Any:
    """`multiply(x, weight, y, start, stop)` as machine code, kept on disk for the next process.

    x [rows / 8 * in, 8] float32: eight rows of the operand, channel by channel, behind the eight before. weight
    [out, in] of `STORED[stored]`, in a multiple of 16, out at least 8. y [rows, out] float32, of which columns `start`
    to `stop`, at least 8, are written: x W^T.
    """
    are_floats = stored == "float32"

    def multiply(x, weight, y, start, stop):  # type: ignore[no-untyped-def]
        width, rows = weight.shape[1], y.shape[0]
        sums = np.empty((EIGHT, rows), np.float32)
        unpacked = np.empty((0 if are_floats else EIGHT, CHUNK), np.float32)
        for tile in range(start, stop, EIGHT):
            first = min(tile, stop - EIGHT)  # the last tile overlaps with the one before
            sums[:] = 0
            for column in range(0, width, CHUNK):
                channels = min(CHUNK, width - column)
                if not are_floats:
                    unpack(weight, first, column, unpacked, EIGHT, channels)
                for r in range(0, rows, EIGHT):
                    base = r // EIGHT * width + column
                    if are_floats:
                        add_products(x, base, weight, first, column, channels, sums, r)
                    else:
                        add_products(x, base, unpacked, 0, 0, channels, sums, r)
            for r in range(0, rows, EIGHT):
                s0, s1, s2, s3 = load(sums, 0, r), load(sums, 1, r), load(sums, 2, r), load(sums, 3, r)
                s4, s5, s6, s7 = load(sums, 4, r), load(sums, 5, r), load(sums, 6, r), load(sums, 7, r)
                store_turned(s0, s1, s2, s3, y, r, first)
                store_turned(s4, s5, s6, s7, y, r, first + 4)

    multiply.__qualname__ = f"multiply_{stored}"  # a name in the cache of its own
    given = types.void(float32[:, ::1], STORED[stored][:, ::1], float32[:, ::1], int64, int64)
    return kept_on_disk(multiply, given)
