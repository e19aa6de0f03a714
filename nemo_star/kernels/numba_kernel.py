"""Decode attention on CPU at the speed of memory: a few queries over a long cache, compiled by Numba.

torch's flash attention for CPU prepares K and V for matrix products. Over a cache that is read once, for a few query
rows, that takes three to five times as long as reading it. Everything else is torch's (`TorchCpuKernel`).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from nemo_star.kernels.merge import merge_partials
from nemo_star.kernels.torch_cpu import TorchCpuKernel

ROWS = (4, 8, 12, 16, 24, 32, 48, 64)
"""Rows that code is made for: the query heads of a group, of all tokens that ask together. Up to the last, it is
faster than matrix products."""
MIN_BYTES = 2**22
"""K and V of a layer: below, compiling takes longer than a few hundred tokens gain."""
MORE_FOR_ROWS = 4
"""Times as many for several tokens: most are a query, which comes once, and code for many rows compiles for seconds."""
BYTES_PER_THREAD = 2**20
"""Of K and V: below, handing the work over takes longer than the work."""
BITS = {torch.float32: torch.float32, torch.bfloat16: torch.int16, torch.float16: torch.uint16}
"""As in numba_code.py: numpy has no bfloat16, and Numba no float16."""


@functools.cache  # looking for it takes as long as a small product
def is_installed() -> bool:
    """Whether Numba is there; it is imported when it is first needed."""
    return importlib.util.find_spec("numba") is not None


class NumbaKernel(TorchCpuKernel):
    """torch's CPU kernel, but for a few tokens over a cache of 4 MiB or more whose tokens lie one behind the other
    (`KVCache` on CPU): at most 64 query heads to a group, over all of them, and head dimensions that are multiples of
    16."""

    name = "numba"

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if window is None and (q.shape[0] == 1 or not causal) and takes(q, k, v):
            return attend(q, k, v, scale)
        return super().decode(q, k, v, scale, causal, window)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend` can do these, and gains by it: q [sq, b, np, hn]; k, v [sk, b, ng, hn]."""
    return (
        q.shape[0] * (q.shape[2] // k.shape[2]) <= ROWS[-1]
        and 2 * k.nbytes >= MIN_BYTES * (1 if q.shape[0] == 1 else MORE_FOR_ROWS)
        and k.dtype in BITS
        and k.dtype == v.dtype
        and k.shape == v.shape
        and k.shape[3] % 16 == 0
        and all(x.stride(0) == x.shape[3] and x.stride(3) == 1 for x in (k, v))
        and free_cores() >= torch.get_num_threads()
    )


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of a few tokens over all keys, by as many threads as torch has.

    Args:
        q: [sq, b, np, hn], any float type.
        k, v: [sk, b, ng, hn], sk > 0, float32, bfloat16 or float16; the tokens of a group one behind the other; hn a
            multiple of 16.

    Returns:
        out [sq, b, np, hn] and lse [sq, b, np], float32.
    """
    sq, b, heads, hn = q.shape
    sk, _, ng, _ = k.shape
    rows = sq * heads // ng
    padded = next(size for size in ROWS if size >= rows)
    work = _code(padded, hn, str(k.dtype).removeprefix("torch."))
    threads = max(1, min(torch.get_num_threads(), 2 * k.nbytes // BYTES_PER_THREAD, sk))
    scaled = q.new_zeros(b, ng, padded, hn, dtype=torch.float32)
    by_group = q.view(sq, b, ng, heads // ng, hn).permute(1, 2, 0, 3, 4).reshape(b, ng, rows, hn)
    scaled[:, :, :rows] = by_group * (scale * math.log2(math.e))
    out = scaled.new_empty(threads, b, ng, padded, hn)
    lse = scaled.new_empty(threads, b, ng, padded)
    keys, values = (x.view(BITS[k.dtype]).permute(1, 2, 0, 3).numpy() for x in (k, v))
    queries, outs, lses = (x.numpy() for x in (scaled, out, lse))

    def run(thread: int) -> None:
        tokens = slice(sk * thread // threads, sk * (thread + 1) // threads)
        for i in range(b):
            for g in range(ng):
                work(queries[i, g], keys[i, g, tokens], values[i, g, tokens], outs[thread, i, g], lses[thread, i, g])

    if threads == 1:
        run(0)
    else:
        list(thread_pool(torch.get_num_threads()).map(run, range(threads)))
    by_token = (threads, b, ng, sq, heads // ng)
    partial_outs = out[:, :, :, :rows].reshape(*by_token, hn).permute(0, 3, 1, 2, 4, 5).flatten(3, 4)
    partial_lses = lse[:, :, :, :rows].reshape(by_token).permute(0, 3, 1, 2, 4).flatten(3, 4) * math.log(2)
    return (partial_outs[0], partial_lses[0]) if threads == 1 else merge_partials(partial_outs, partial_lses)


def free_cores() -> int:
    """Cores that new threads may run on: OMP_PROC_BIND leaves one, and torch's own threads have theirs already."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def thread_pool(threads: int) -> ThreadPoolExecutor:
    """The code runs outside Python's lock, so Python's threads do."""
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")


@functools.cache
def _code(rows: int, channels: int, stored: str) -> Any:
    from nemo_star.kernels.numba_code import compiled

    return compiled(rows, channels, stored)
