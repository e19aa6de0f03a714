"""Decode attention on CUDA by a kernel of the project's own, in Triton, which reads K/V in float8, too."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from nemo_star.kernels.torch_flash import FlashKernel
from nemo_star.kernels.two_parts import no_keys

MAX_ROWS = 64
"""Query heads of a group, of all tokens that ask together, that read K/V once; for more, torch's kernel is made."""
PROGRAMS_PER_PROCESSOR = 2
"""That a GPU is given to do at once: three fit by their shared memory. Not measured."""


def is_installed() -> bool:
    """Whether Triton is there (torch's CUDA builds for Linux bring it); it is imported when it is first needed."""
    return importlib.util.find_spec("triton") is not None


class TritonKernel(FlashKernel):
    """torch's flash attention, but for decode without a window: of a few tokens, and of any over K/V in float8.

    Float8 is read as it is and converted in registers, so it takes half the bytes.

    Args:
        programs: that run at once; None: by the device's multiprocessors.
    """

    name = "triton"
    narrow: tuple[torch.dtype, ...] = (torch.float8_e4m3fn, torch.float8_e5m2)
    """Types of K/V that `decode` reads though q has another."""

    def __init__(self, programs: int | None = None) -> None:
        self._programs = programs

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if k.shape[0] == 0:
            return no_keys(q)
        is_narrow = k.dtype in self.narrow
        rows = q.shape[0] * (q.shape[2] // k.shape[2])
        if window is not None or (rows > MAX_ROWS and not is_narrow):
            return super().decode(q, k.to(q.dtype), v.to(q.dtype), scale, causal, window)
        from nemo_star.kernels.triton_decode import attend

        programs = self._programs or _processors(q.device) * PROGRAMS_PER_PROCESSOR
        return attend(q, k, v, scale, causal=causal, programs=programs, has_e4m3=_has_e4m3(q.device))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _has_e4m3(device: torch.device) -> bool:
    """Whether the device converts float8_e4m3fn by itself (PTX ISA, `cvt`: sm_89)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
