"""The float32 oracle, and attention by position."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_star.kernels.two_parts import no_keys

ROWS = 128
"""Queries that `attend_at` takes at once."""
MAX_SCORES = 2**28
"""Scores that are in memory at once, 1 GiB in float32; the mask, the weights and their masked copy are as many."""


class MathKernel:
    """The float32 oracle: textbook softmax attention, for tests and what no other kernel takes.

    Args:
        max_scores: a call with more takes its queries in chunks; the scores of one query are never divided.
    """

    name = "math"

    def __init__(self, max_scores: int = MAX_SCORES) -> None:
        self._max_scores = max_scores

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
        return self.decode(q, k, v, scale, causal=True, window=window)[0].to(q.dtype)

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        sq, sk = q.shape[0], k.shape[0]
        if sk == 0:
            return no_keys(q)
        rows = max(1, self._max_scores // (q.shape[1] * q.shape[2] * sk))
        parts = []
        for start in range(0, max(sq, 1), rows):  # of no queries, none
            chunk = q[start : start + rows]
            seen = sk - sq + start + chunk.shape[0] if causal else sk  # the chunk's last query sees no further
            visible = torch.ones(chunk.shape[0], seen, dtype=torch.bool, device=q.device)
            if causal:
                visible = visible.tril(diagonal=sk - sq + start)
            if window is not None:
                visible = visible.triu(diagonal=sk - sq + start - window + 1)
            parts.append(attend_visible(chunk, k[:seen], v[:seen], scale, visible))
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses)


def attend_visible(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that `visible` [sq, sk] (bool) says; a query that sees none: out 0, lse -inf."""
    repeats = q.shape[2] // k.shape[2]
    keys, values = (x.float().repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("qbnh,kbnh->bnqk", q.float(), keys) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1))
    return torch.einsum("bnqk,kbnh->qbnh", weights, values), lse.permute(2, 0, 1)


def attend_at(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, first: int, positions: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Attention within a window over keys that lie anywhere before: what decode has for several tokens at once.

    Args:
        first: position of the first query; the others follow it one by one.
        positions: [sk] int64, of the keys, ascending.

    Returns:
        out [sq, b, np, hn], lse [sq, b, np], float32; a query that sees no key: out 0, lse -inf.
    """
    if k.shape[0] == 0:
        return no_keys(q)
    parts, keys, values = [], k.float(), v.float()  # now: of fp8, not every torch can pick rows
    for start in range(0, q.shape[0], ROWS):
        rows = q[start : start + ROWS]
        at = torch.arange(first + start, first + start + rows.shape[0], device=q.device)
        seen = (positions > at[0] - window) & (positions <= at[-1])
        here = positions[seen]
        visible = (here <= at[:, None]) & (here > at[:, None] - window)
        parts.append(attend_visible(rows, keys[seen], values[seen], scale, visible))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)
