"""Which kernels a model's sizes get, of the one that `attention.kernel` names for a device.

Transformer Engine builds a plan for every pair of lengths that it has not seen (`te.py`), and in decode every token
makes a new one: tens to hundreds of milliseconds, and memory that is not freed. Torch's flash attention has no plans,
and for one query it divides K/V over the GPU and reads them once for a query group. So decode is its, prefill stays
Transformer Engine's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_star.kernels.math import MathKernel
from nemo_star.kernels.registry import Kernel, kernels_that_run
from nemo_star.kernels.torch_flash import FlashKernel

PROBED = ((65, 65), (65, 131))
"""Query and key lengths that are tried: no multiples of 64, without and with keys of an anchor."""


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
    kernel: Kernel, sizes: Heads, device: torch.device, dtype: torch.dtype, *, decode: bool
) -> tuple[Kernel, str | None]:
    """The kernel of prefill or of decode, and what a user should know of the choice.

    Args:
        kernel: from `get_kernel`, for this device and type. Transformer Engine's is tried on a few tokens.
        decode: it is for decode.
    """
    flash = "flash" in kernels_that_run(device, dtype) and FlashKernel.takes(sizes.channels)
    if kernel.name == "te" and decode and flash:
        return FlashKernel(), None
    problem = None
    if kernel.name == "te":
        problem = _problem(kernel, sizes, device, dtype)
    elif kernel.name == "flash" and not flash:
        problem = f"its heads have {sizes.channels} dimensions"
    if problem is None:
        return kernel, None
    instead: Kernel = FlashKernel() if flash else MathKernel()
    slow = "" if flash else ", which is slow"
    return instead, f"attention.kernel={kernel.name} does not take this model ({problem}): {instead.name} instead{slow}"


def names(prefill: Kernel, decode: Kernel) -> str:
    """Of the kernels, for a person."""
    return prefill.name if prefill.name == decode.name else f"prefill {prefill.name}, decode {decode.name}"


def _problem(kernel: Kernel, sizes: Heads, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot do prefill and partial results at these sizes; None: it can."""
    for sq, sk in PROBED:
        q = torch.zeros(sq, 1, sizes.heads, sizes.channels, dtype=dtype, device=device)
        k = torch.zeros(sk, 1, sizes.groups, sizes.channels, dtype=dtype, device=device)
        try:
            for window in {None, sizes.window}:
                kernel.prefill(q, k, k, 1.0, window)
                kernel.decode(q, k, k, 1.0, True, window)  # ring's prefill, and that of models with sinks
        except Exception as error:  # libraries refuse a size with whatever they like
            return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    return None
