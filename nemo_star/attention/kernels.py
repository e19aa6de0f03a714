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

from nemo_star.attention.merge import merge_partials

aten = torch.ops.aten


class Kernel(Protocol):
    name: str

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]: ...


def _empty(q: Tensor) -> tuple[Tensor, Tensor]:
    """The result over no keys."""
    return q.new_zeros(q.shape, dtype=torch.float32), q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float32)


class MathKernel:
    """The float32 oracle: textbook softmax attention, with a score matrix of sq x sk. For tests and small inputs."""

    name = "math"

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self.decode(q, k, v, scale, causal=True)[0].to(q.dtype)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        sq, sk, repeats = q.shape[0], k.shape[0], q.shape[2] // k.shape[2]
        if sk == 0:
            return _empty(q)
        keys, values = (x.float().repeat_interleave(repeats, dim=2) for x in (k, v))
        scores = torch.einsum("qbnh,kbnh->bnqk", q.float(), keys) * scale
        if causal:
            visible = torch.ones(sq, sk, dtype=torch.bool, device=q.device).tril(diagonal=sk - sq)
            scores = scores.masked_fill(~visible, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        out = torch.einsum("bnqk,kbnh->qbnh", torch.exp(scores - lse.unsqueeze(-1)), values)
        return out, lse.permute(2, 0, 1)


class CpuKernel:
    """torch's flash attention for CPU: float32 or bfloat16, grouped queries without repeating K/V.

    Its `is_causal` is aligned to the top left when sq != sk, and an empty K ends the process: so keys before the last
    sq are a part of their own, unmasked, and no part without keys is computed.
    """

    name = "cpu"

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if q.shape[0] == k.shape[0]:
            return _cpu_flash(q, k, v, scale, causal=True)[0]
        return self.decode(q, k, v, scale, causal=True)[0].to(q.dtype)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        sq, sk = q.shape[0], k.shape[0]
        if sk == 0:
            return _empty(q)
        if not causal or sq == 1:
            return _cpu_flash_folded(q, k, v, scale)
        own_out, own_lse = _cpu_flash(q, k[sk - sq :], v[sk - sq :], scale, causal=True)
        if sk == sq:
            return own_out.float(), own_lse
        past_out, past_lse = _cpu_flash_folded(q, k[: sk - sq], v[: sk - sq], scale)
        return merge_partials(torch.stack((past_out, own_out.float())), torch.stack((past_lse, own_lse)))


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's kernel on Megatron's layout: out [sq, b, np, hn], lse [sq, b, np]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1).float()


def _cpu_flash_folded(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Unmasked attention with the query heads of a group folded into the query length.

    K/V are then read once per group instead of once per query head: in decode, where reading them is all the work, the
    difference is the group's size.
    """
    sq, b, heads, hn = q.shape
    ng = k.shape[2]
    folded = q.view(sq, b, ng, heads // ng, hn).permute(0, 3, 1, 2, 4).reshape(sq * (heads // ng), b, ng, hn)
    out, lse = _cpu_flash(folded, k, v, scale, causal=False)
    out = out.reshape(sq, heads // ng, b, ng, hn).permute(0, 2, 3, 1, 4).reshape(sq, b, heads, hn)
    lse = lse.reshape(sq, heads // ng, b, ng).permute(0, 2, 3, 1).reshape(sq, b, heads)
    return out.float(), lse


class FlashKernel:
    """torch's CUDA flash attention: float16 or bfloat16, causal aligned to the bottom right, grouped queries.

    Over an empty K it would return lse = +inf, the wrong sign for a merge: that case never reaches it.
    """

    name = "flash"

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return _cuda_flash(q, k, v, scale, causal=True)[0]

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        if k.shape[0] == 0:
            return _empty(q)
        out, lse = _cuda_flash(q, k, v, scale, causal and q.shape[0] > 1)
        return out.float(), lse


def _cuda_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's kernel takes [b, s, heads, hn]: a view of Megatron's layout."""
    sq, sk = q.shape[0], k.shape[0]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(q, k, v, None, None, sq, sk, 0.0, causal, False, scale=scale)
    return out.transpose(0, 1), lse.permute(2, 0, 1)


_KERNELS: dict[str, type[Kernel]] = {"math": MathKernel, "cpu": CpuKernel, "flash": FlashKernel}


def get_kernel(name: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel called `name`; `auto` takes the fastest that runs on this device with this type.

    Raises:
        ValueError: the kernel cannot run there; the message says which can.
    """
    runs = {
        "math": True,
        "cpu": device.type == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16),
        "flash": device.type == "cuda" and dtype in (torch.bfloat16, torch.float16),
    }
    if name == "auto":
        name = next(kind for kind in ("flash", "cpu", "math") if runs[kind])
    if name not in runs or not runs[name]:
        can = ", ".join(kind for kind, possible in runs.items() if possible)
        raise ValueError(f"attention.kernel={name} does not run on {device.type} with {dtype}; these do: {can}")
    return _KERNELS[name]()
