"""Plain float64 attention, and inputs for it."""

import torch

SHAPES = [(1, 1), (1, 40), (7, 7), (7, 40), (64, 64), (33, 97)]
"""(queries, keys)."""


def reference(q, k, v, scale, causal, window=None):
    """out [sq, b, np, hn], lse [sq, b, np] in float64, written for clarity; a window goes with causal."""
    repeats = q.shape[2] // k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(repeats, 2), v.double().repeat_interleave(repeats, 2)
    scores = torch.einsum("qbnh,kbnh->bnqk", q, k) * scale
    if causal:
        sq, sk = q.shape[0], k.shape[0]
        ahead = torch.arange(sk)[None] - (torch.arange(sq)[:, None] + sk - sq)
        hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
        scores[:, :, hidden] = float("-inf")
    out = torch.einsum("bnqk,kbnh->qbnh", scores.softmax(-1), v)
    return out, scores.logsumexp(-1).permute(2, 0, 1)


def inputs(sq, sk, heads=4, groups=2, batch=1, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sq, batch, heads, 16), (sk, batch, groups, 16), (sk, batch, groups, 16))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
