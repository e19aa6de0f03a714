"""Linear layers of a few rows on CPU: a token of several questions, or a question of a few dozen tokens.

Of one row, torch's products read the weight at the speed of memory. Of a few more, MKL packs the weight anew each time,
and in 16 bits oneDNN takes as long for each row as for one, where the processor cannot multiply these types
(BENCHMARKS.md, "Products of a few rows"; with AVX-512 it can). Compiled by Numba, they read it once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_star.kernels.numba_kernel import BITS, free_cores, is_installed, thread_pool

MIN_NUMBERS = 2**20
"""Of a weight: below, there is little to gain, and compiling takes a second."""
_ROWS = {torch.float32: range(3, 17), torch.bfloat16: range(3, 65), torch.float16: range(3, 65)}
"""For which it is faster; up to the last that was tried in 16 bits."""
_EIGHT = 8
"""Rows that go together."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, with sums in float32 where the code above takes it.

    Args:
        x: [..., in], weight [out, in], bias [out].

    Returns:
        [..., out], of x's type.
    """
    if not takes(x, weight):
        return F.linear(x, weight, bias)
    out = _product(x.reshape(-1, x.shape[-1]), weight)
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled code can do it, and gains by it."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.numel() // x.shape[-1] in _ROWS.get(weight.dtype, ())
        and fits(weight)
        and free_cores() >= torch.get_num_threads()
    )


def fits(weight: Tensor) -> bool:
    """The same of the weight [out, in] alone, for some numbers of rows."""
    return (
        weight.device.type == "cpu"
        and weight.numel() >= MIN_NUMBERS
        and weight.dtype in _ROWS
        and (weight.dtype == torch.float32 or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"))
        and weight.shape[1] % 16 == 0
        and weight.shape[0] >= _EIGHT * torch.get_num_threads()
        and weight.is_contiguous()
        and is_installed()
    )


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] -> [rows, out] float32, by as many threads as torch has."""
    rows, width = x.shape
    padded = -(-rows // _EIGHT) * _EIGHT
    turned = x.new_empty(padded // _EIGHT, width, _EIGHT, dtype=torch.float32)
    by_eight = F.pad(x, (0, 0, 0, padded - rows)).view(-1, _EIGHT, width)
    turned.copy_(by_eight.transpose(1, 2))
    out = turned.new_empty(padded, weight.shape[0])
    multiply = _code(str(weight.dtype).removeprefix("torch."))
    given = turned.flatten(0, 1).numpy(), weight.detach().view(BITS[weight.dtype]).numpy(), out.numpy()
    threads = torch.get_num_threads()
    edges = [weight.shape[0] * thread // threads for thread in range(threads + 1)]
    if threads == 1:
        multiply(*given, *edges)
    else:
        list(thread_pool(threads).map(lambda start, stop: multiply(*given, start, stop), edges, edges[1:]))
    return out[:rows]


@functools.cache
def _code(stored: str) -> Any:
    from nemo_star.kernels.numba_products import compiled

    return compiled(stored)
