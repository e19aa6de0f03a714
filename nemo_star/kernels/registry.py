"""Attention of queries over the keys that one rank holds. Every kernel has the same two functions:

`prefill(q, k, v, scale) -> out`: causal, aligned to the bottom right: query i sees keys up to i + sk - sq, so that the
keys before the last sq (an anchor) are seen by all queries.

`decode(q, k, v, scale, causal) -> (out, lse)`: over cached keys; `causal` says that the last sq keys are the queries'
own (bottom right again), else every query sees every key. Without any key: out 0, lse -inf.

    sq   query length        np   query heads (of this tensor-parallel rank)
    sk   key length          ng   query groups (KV heads)
    b    batch               hn   head dimension

q [sq, b, np, hn]; k, v [sk, b, ng, hn] (any strides with a dense last dimension); out [sq, b, np, hn] (of q's type for
prefill, float32 for decode); lse [sq, b, np] float32, natural logarithm, scale included.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nemo_star.kernels import streaming
from nemo_star.kernels.te import TEKernel
from nemo_star.kernels.two_parts import decode_by_parts, no_keys
from nemo_star.runtime.transformer_engine import find_transformer_engine, is_loaded

aten = torch.ops.aten


class Kernel(Protocol):
    name: str

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]: ...


class MathKernel:
    """The float32 oracle: textbook softmax attention, with a score matrix of sq x sk. For tests and small inputs."""

    name = "math"

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self.decode(q, k, v, scale, causal=True)[0].to(q.dtype)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        sq, sk, repeats = q.shape[0], k.shape[0], q.shape[2] // k.shape[2]
        if sk == 0:
            return no_keys(q)
        keys, values = (x.float().repeat_interleave(repeats, dim=2) for x in (k, v))
        scores = torch.einsum("qbnh,kbnh->bnqk", q.float(), keys) * scale
        if causal:
            visible = torch.ones(sq, sk, dtype=torch.bool, device=q.device).tril(diagonal=sk - sq)
            scores = scores.masked_fill(~visible, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        out = torch.einsum("bnqk,kbnh->qbnh", torch.exp(scores - lse.unsqueeze(-1)), values)
        return out, lse.permute(2, 0, 1)


class CpuKernel:
    """torch's flash attention for CPU: float32, bfloat16 or float16, grouped queries without repeating K/V; over a long
    cache, for one token, code made for it (`streaming.py`).

    torch's `is_causal` is aligned to the top left when sq != sk, and an empty K ends the process: `decode_by_parts`
    asks for neither.
    """

    name = "cpu"

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if q.shape[0] == k.shape[0]:
            return _cpu_flash(q, k, v, scale, causal=True)[0]
        return self.decode(q, k, v, scale, causal=True)[0].to(q.dtype)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        if streaming.streams(q, k, v):
            return streaming.attend(q, k, v, scale)
        return decode_by_parts(_cpu_flash, q, k, v, scale, causal=causal)


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's kernel on Megatron's layout: out [sq, b, np, hn], lse [sq, b, np]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1).float()


class FlashKernel:
    """torch's CUDA flash attention: float16 or bfloat16, causal aligned to the bottom right, grouped queries.

    Over an empty K it would return lse = +inf, the wrong sign for a merge: that case never reaches it.
    """

    name = "flash"

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return _cuda_flash(q, k, v, scale, causal=True)[0]

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        if k.shape[0] == 0:
            return no_keys(q)
        out, lse = _cuda_flash(q, k, v, scale, causal and q.shape[0] > 1)
        return out.float(), lse


def _cuda_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's kernel takes [b, s, heads, hn]: a view of Megatron's layout."""
    sq, sk = q.shape[0], k.shape[0]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(q, k, v, None, None, sq, sk, 0.0, causal, False, scale=scale)
    return out.transpose(0, 1), lse.permute(2, 0, 1)


_KERNELS: dict[str, type[Kernel]] = {"math": MathKernel, "cpu": CpuKernel, "flash": FlashKernel, "te": TEKernel}


def kernels_that_run(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of the kernels that run on this device with this type, the one to prefer first."""
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    fits = fits and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere, for both
    runs = {
        "te": fits and is_loaded(),
        "flash": fits,
        "cpu": device.type == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16),
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
        why = "" if name != "te" or is_loaded() else f" ({find_transformer_engine().told()})"
        raise ValueError(
            f"attention.kernel={name} does not run on {device.type} with {dtype}{why}; these do: {', '.join(can)}"
        )
    return _KERNELS[name]()
