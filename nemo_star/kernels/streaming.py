"""Decode attention on CPU at the speed of memory: one token's queries over the cached K/V.

torch's flash attention for CPU prepares K and V for matrix products. Over a cache that is read once, for a few query
rows, that takes three to five times as long as reading it. Here the code is made for the rows, the head dimension and
the type at hand, and for this processor, by LLVM, which `pip install nemo-star[cpu]` brings; nobody needs a compiler.
Without it torch's kernel does the work.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from nemo_star.kernels.merge import merge_partials

OLDEST = (0, 45)
"""Of llvmlite, as in pyproject.toml: with opaque pointers."""
MOST_ROWS = 16
"""Query heads of a group: with more, arithmetic is the limit and not memory."""
LEAST_BYTES = 2**22
"""K and V of a layer: below, a quarter of a second for making the code is hundreds of tokens' gain."""
BYTES_PER_THREAD = 2**20
"""Of K and V: below, handing the work over takes longer than the work."""
TILE = 256
"""Tokens: the fastest of 32 to 2,048 at 64 channels. K of a tile and of the next have to fit the second cache."""


@functools.cache
def llvm_version() -> str | None:
    """The version of llvmlite where it can be used."""
    try:
        import llvmlite.binding  # noqa: F401

        found = version("llvmlite")
    except (ImportError, OSError, PackageNotFoundError):
        return None
    return found if tuple(map(int, found.split(".")[:2])) >= OLDEST else None


def streams(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend` takes these, and gains by it: q [sq, b, np, hn]; k, v [sk, b, ng, hn]."""
    return (
        q.shape[0] == 1
        and q.shape[2] // k.shape[2] <= MOST_ROWS
        and 2 * k.nbytes >= LEAST_BYTES
        and k.dtype == v.dtype
        and k.shape == v.shape
        and k.shape[3] % 16 == 0
        and all(x.stride(0) == x.shape[3] and x.stride(3) == 1 for x in (k, v))
        and llvm_version() is not None
        and k.dtype in _dtypes()
        and _cores() >= torch.get_num_threads()
        and _code(q.shape[2] // k.shape[2], k.shape[3], k.dtype, *vector_unit()) is not None
    )


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One token's attention over all keys, by as many threads as torch has.

    Args:
        q: [1, b, np, hn], any float type.
        k, v: [sk, b, ng, hn], sk > 0, float32, bfloat16 or float16; the tokens of a group one behind the other, as
            `KVCache` lays them on CPU; hn a multiple of 16.

    Returns:
        out [1, b, np, hn] and lse [1, b, np], float32.
    """
    _, b, heads, hn = q.shape
    sk, _, ng, _ = k.shape
    rows = heads // ng
    work = _code(rows, hn, k.dtype, *vector_unit())
    assert work is not None
    threads = max(1, min(torch.get_num_threads(), 2 * k.nbytes // BYTES_PER_THREAD, sk))
    q = q.float().contiguous() * (scale * math.log2(math.e))
    out = q.new_empty(threads, *q.shape)
    lse, sums = q.new_empty(2, threads, *q.shape[:-1])
    room = q.new_empty(threads, (TILE + 1) * rows)
    shares: list[list[list[int]]] = []  # for each thread, arguments of its calls
    for thread in range(threads):
        start, stop = sk * thread // threads, sk * (thread + 1) // threads
        tensors = (q[0], k[start], v[start], out[thread, 0], lse[thread, 0], sums[thread, 0])
        rest = [room[thread].data_ptr(), stop - start, ng, k.stride(2), v.stride(2)]
        shares.append([[x[batch].data_ptr() for x in tensors] + rest for batch in range(b)])

    def run(share: list[list[int]]) -> None:
        for arguments in share:
            work(*arguments)

    if threads == 1:
        run(shares[0])
    else:
        list(_pool(torch.get_num_threads()).map(run, shares))
    lse.add_(sums.log2_()).mul_(math.log(2))  # from the largest score, and in base 2
    return (out[0], lse[0]) if threads == 1 else merge_partials(out, lse)


@functools.cache
def vector_unit() -> tuple[int, int]:
    """(floats in a vector register, vector registers) of this processor."""
    from llvmlite import binding as llvm

    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 32
    return (8, 16) if features.get("avx2") else (4, 32 if _is_arm() else 16)


@functools.cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """float16 on x86 without F16C would need a function that this process may lack."""
    from llvmlite import binding as llvm

    half = (torch.float16,) if _is_arm() or llvm.get_host_cpu_features().get("f16c") else ()
    return (torch.float32, torch.bfloat16, *half)


def _is_arm() -> bool:
    from llvmlite import binding as llvm

    return llvm.get_process_triple().startswith(("aarch64", "arm64"))


def _cores() -> int:
    """Cores that new threads may run on: OMP_PROC_BIND leaves one, and torch's own threads have theirs already."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """The code runs outside Python's lock, so Python's threads do."""
    return ThreadPoolExecutor(threads, thread_name_prefix="streaming")


@functools.cache
def _code(rows: int, channels: int, stored: torch.dtype, width: int, registers: int) -> Callable[..., None] | None:
    """The function of `streaming_code.module_of` as machine code for this processor; None where LLVM cannot make it."""
    from llvmlite import binding as llvm

    from nemo_star.kernels.streaming_code import Shape, module_of

    try:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        shape = Shape(rows, channels, str(stored).removeprefix("torch."), width, registers, TILE)
        module = llvm.parse_assembly(str(module_of(shape)))
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(module, passes)
        engine: Any = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
    except Exception as error:  # a release, or a processor, that this was not written for: torch's kernel does the work
        warnings.warn(f"llvmlite {llvm_version()} cannot make code for decode attention: {error}", stacklevel=2)
        return None
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 4)
    work: Any = signature(engine.get_function_address("attend"))
    work.engine = engine  # the code goes when its engine does
    return work
