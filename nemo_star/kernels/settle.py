"""Which kernels a model's sizes get, of the one that `attention.kernel` names for a device.

Transformer Engine builds a plan for every pair of lengths that it has not seen (`te.py`), and in decode every token
makes a new one: tens to hundreds of milliseconds, and memory that is not freed. Torch's flash attention has no plans,
and for one query it divides K/V over the GPU and reads them once for a query group. So decode is its, prefill stays
Transformer Engine's.

The project's own Triton code is compiled where it runs, by whatever Triton and C compiler are there: it is taken where
a few tokens come out right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemo_star.kernels.math import MathKernel
from nemo_star.kernels.merge import Merge, merge_by_triton, merge_with_sinks
from nemo_star.kernels.registry import Kernel, kernels_that_run
from nemo_star.kernels.torch_flash import FlashKernel
from nemo_star.kernels.triton_kernel import TritonKernel

PROBED = ((65, 65), (65, 131))
"""Query and key lengths that are tried: no multiples of 64, without and with keys of an anchor."""
PROBED_IN_DECODE = ((1, 1300), (3, 65))
"""The same of Triton's decode: keys in several stretches, and masked."""
TOLERANCE = 2e-2
"""Of what is tried, where values are normally distributed: some roundings of bfloat16."""


@dataclass(frozen=True)
class Heads:
    """Sizes of attention on this rank."""

    heads: int
    groups: int
    channels: int
    window: int | None = None
    """Of windowed layers, where the model has such."""


USUAL_HEADS = Heads(32, 8, 128)
"""Where there is no model to ask."""


def settle(
    kernel: Kernel,
    sizes: Heads,
    device: torch.device,
    dtype: torch.dtype,
    *,
    decode: bool,
    stored: torch.dtype | None = None,
) -> tuple[Kernel, str | None]:
    """The kernel of prefill or of decode, and what a user should know of the choice.

    Args:
        kernel: from `get_kernel`, for this device and type. Transformer Engine's is tried on a few tokens.
        decode: it is for decode.
        stored: type of cached K/V, where they are narrower: a kernel that reads them is taken where one runs.
    """
    can = kernels_that_run(device, dtype)
    flash = "flash" in can and FlashKernel.takes(sizes.channels)
    if kernel.name == "triton" and not decode and flash:
        return FlashKernel(), None
    own = stored in TritonKernel.narrow and "triton" in can and flash
    if kernel.name in ("te", "flash") and decode and own:
        kernel = TritonKernel()
    if kernel.name == "te" and decode and flash:
        return FlashKernel(), None
    problem = None
    if kernel.name == "te":
        problem = _problem(kernel, sizes, device, dtype)
    elif kernel.name in ("flash", "triton") and not flash:
        problem = f"its heads have {sizes.channels} dimensions"
    elif kernel.name == "triton":
        problem = _decode_problem(kernel, sizes, device, dtype, stored or dtype)
    if problem is None:
        return kernel, None
    instead: Kernel = FlashKernel() if flash else MathKernel()
    slow = "" if flash else ", which is slow"
    return instead, f"attention.kernel={kernel.name} does not take this model ({problem}): {instead.name} instead{slow}"


def settle_merge(merge: Merge, sizes: Heads, device: torch.device, dtype: torch.dtype) -> tuple[Merge, str | None]:
    """What merges partial results, and what a user should know of the choice.

    Args:
        merge: from `get_merge`. Triton's is tried on a few tokens.
        dtype: of the merged result.
    """
    if merge is not merge_by_triton:
        return merge, None

    def run() -> bool:
        outs = _random(2, 3, 1, sizes.heads, sizes.channels, device=device)
        lses = _random(2, 3, 1, sizes.heads, device=device)
        lses[0, 0] = float("-inf")
        outs[0, 0] = float("nan")
        pairs = zip(merge(outs, lses, None, dtype), merge_with_sinks(outs, lses, None, dtype), strict=True)
        return all(torch.allclose(mine.float(), own.float(), atol=TOLERANCE) for mine, own in pairs)

    problem = _tried(run)
    if problem is None:
        return merge, None
    return merge_with_sinks, f"parallel.merge=triton does not run here ({problem}): torch instead"


def names(prefill: Kernel, decode: Kernel) -> str:
    """Of the kernels, for a person."""
    return prefill.name if prefill.name == decode.name else f"prefill {prefill.name}, decode {decode.name}"


def _problem(kernel: Kernel, sizes: Heads, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot do prefill and partial results at these sizes; None: it can."""

    def run() -> bool:
        for sq, sk in PROBED:
            q = torch.zeros(sq, 1, sizes.heads, sizes.channels, dtype=dtype, device=device)
            k = torch.zeros(sk, 1, sizes.groups, sizes.channels, dtype=dtype, device=device)
            for window in {None, sizes.window}:
                kernel.prefill(q, k, k, 1.0, window)
                kernel.decode(q, k, k, 1.0, True, window)  # ring's prefill, and that of models with sinks
        return True

    return _tried(run)


def _decode_problem(
    kernel: Kernel, sizes: Heads, device: torch.device, dtype: torch.dtype, stored: torch.dtype
) -> str | None:
    """Why a kernel cannot decode over K/V of type `stored`; None: it can, and is right."""

    def run() -> bool:
        for sq, sk in PROBED_IN_DECODE:
            q = _random(sq, 1, sizes.heads, sizes.channels, device=device).to(dtype)
            k, v = _random(2, sk, 1, sizes.groups, sizes.channels, device=device).to(stored)
            scale = sizes.channels**-0.5
            mine = kernel.decode(q, k, v, scale, True)
            exact = MathKernel().decode(q, k.to(dtype), v.to(dtype), scale, True)
            if not all(torch.allclose(*pair, atol=TOLERANCE) for pair in zip(mine, exact, strict=True)):
                return False
        return True

    return _tried(run)


def _random(*shape: int, device: torch.device) -> torch.Tensor:
    """The same numbers every time, which leave everybody else's as they are."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)


def _tried(run: Callable[[], bool]) -> str | None:
    """Why it does not run; None: it does."""
    try:
        return None if run() else "its results are wrong"
    except Exception as error:  # libraries refuse a size with whatever they like
        return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
