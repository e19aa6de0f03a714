"""Attention of queries over the keys that one rank holds. Every kernel has the same two functions:

`prefill(q, k, v, scale, window=None) -> out`: causal, aligned to the bottom right: query i sees keys up to i + sk - sq,
so that the keys before the last sq (an anchor) are seen by all queries. With a window, query i sees the last `window`
of these only.

`decode(q, k, v, scale, causal, window=None) -> (out, lse)`: over cached keys; `causal` says that the last sq keys are
the queries' own (bottom right again), else every query sees every key; a window goes with `causal`. Without any key:
out 0, lse -inf.

    sq   query length        np   query heads (of this tensor-parallel rank)
    sk   key length          ng   query groups (KV heads)
    b    batch               hn   head dimension

q [sq, b, np, hn]; k, v [sk, b, ng, hn] (any strides with a dense last dimension); out [sq, b, np, hn] (of q's type for
prefill, float32 for decode); lse [sq, b, np] float32, natural logarithm, scale included.

A kernel may have a class attribute `narrow`: the types of K/V that its `decode` reads though q has another one; and
`decode_ragged`: one query of each of several sequences over that sequence's keys (torch_cpu.py).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nemo_star.kernels.math import MathKernel
from nemo_star.kernels.merge import Merge, merge_by_triton, merge_with_sinks
from nemo_star.kernels.numba_kernel import NumbaKernel, is_installed
from nemo_star.kernels.te import TEKernel
from nemo_star.kernels.torch_cpu import TorchCpuKernel
from nemo_star.kernels.torch_flash import FlashKernel
from nemo_star.kernels.triton_kernel import TritonKernel
from nemo_star.kernels.triton_kernel import is_installed as has_triton
from nemo_star.runtime.transformer_engine import find_transformer_engine, is_loaded

NO_TRITON = "Triton is not installed: torch's CUDA builds for Linux bring it"


class Kernel(Protocol):
    name: str

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor: ...

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None = None
    ) -> tuple[Tensor, Tensor]: ...


_KERNELS: dict[str, type[Kernel]] = {
    "te": TEKernel,
    "flash": FlashKernel,
    "triton": TritonKernel,
    "numba": NumbaKernel,
    "cpu": TorchCpuKernel,
    "math": MathKernel,
}


def kernels_that_run(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of the kernels that run on this device with this type, the one to prefer first."""
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    fits = fits and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere, for both
    on_cpu = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16)
    flash = fits and torch.backends.cuda.is_flash_attention_available()  # a torch can be built without
    runs = {
        "te": fits and is_loaded(),
        "flash": flash,
        "triton": flash and has_triton(),  # takes decode only
        "numba": on_cpu and is_installed(),
        "cpu": on_cpu,
        "math": True,
    }
    return [name for name, possible in runs.items() if possible]


def get_kernel(name: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel called `name`; `auto` takes the first of `kernels_that_run`.

    Raises:
        ValueError: the kernel cannot run there; the message says which can.
    """
    can = kernels_that_run(device, dtype)
    if name == "auto":
        name = can[0]
    if name not in can:
        why = ""
        if name == "te" and not is_loaded():
            why = f" ({find_transformer_engine().told()})"
        elif name == "numba" and not is_installed():
            why = " (Numba is not installed: pip install 'nemo-star[cpu]')"
        elif name == "triton" and device.type == "cuda" and not has_triton():
            why = f" ({NO_TRITON})"
        raise ValueError(
            f"attention.kernel={name} does not run on {device.type} with {dtype}{why}; these do: {', '.join(can)}"
        )
    return _KERNELS[name]()


def get_merge(name: str, device: torch.device) -> Merge:
    """What `parallel.merge` names; `auto` takes Triton's on a GPU, where it is installed.

    Raises:
        ValueError: it cannot run there.
    """
    runs = device.type == "cuda" and has_triton()
    if name == "triton" and not runs:
        why = NO_TRITON if device.type == "cuda" else f"not on {device.type}"
        raise ValueError(f"parallel.merge=triton does not run here ({why}); parallel.merge=torch does")
    return merge_by_triton if runs and name != "torch" else merge_with_sinks
