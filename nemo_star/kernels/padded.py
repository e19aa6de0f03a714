"""Attention over keys whose number only the device knows."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_padded(q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """One query of each sequence over the first `lengths` of its keys, in float32.

    All slots are computed and those beyond are masked: no size depends on a length, so that a CUDA graph may hold it.
    Slots that nothing was written to must hold finite numbers, which get no weight.

    Args:
        q: [n, np, hn].
        k, v: [n, slots, ng, hn].
        lengths: [n] int64; 0 is allowed.

    Returns:
        out [n, np, hn] and lse [n, np], float32; without any key: out 0, lse -inf.
    """
    n, heads, hn = q.shape
    slots, groups = k.shape[1:3]
    grouped = q.float().view(n, groups, heads // groups, hn)
    keys, values = (x.permute(0, 2, 1, 3).float() for x in (k, v))  # [n, ng, slots, hn]
    scores = torch.matmul(grouped, keys.transpose(-1, -2)) * scale
    beyond = torch.arange(slots, device=q.device) >= lengths[:, None]
    scores = scores.masked_fill(beyond[:, None, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0))
    return torch.matmul(weights, values).reshape(n, heads, hn), lse.reshape(n, heads)
