"""Attention of windowed layers (arXiv 2004.05150, section 3.1): a token sees itself and the `window - 1` before it.

Put together from calls that a library has without windows, as in `two_parts.py`. Shapes as in
`nemo_star.kernels.registry`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_star.kernels.two_parts import Attend, decode_by_parts

CHUNK = 256
"""Queries of one masked call. Its keys are the chunk and the window before it, so long chunks waste less on windows
that are short, and short ones on windows that are long: near the best of 128 to 1,024 for windows of 128 and 1,024."""

MaskedAttend = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""q [n, np, sq, hn], k and v [n, ng, sk, hn], mask [sq, sk] (0 or -inf), scale -> out [n, np, sq, hn], lse [n, np, sq];
every query sees a key."""


def windowed(
    attend: Attend, masked: MaskedAttend, q: Tensor, k: Tensor, v: Tensor, scale: float, *, window: int
) -> tuple[Tensor, Tensor]:
    """Causal attention, aligned to the bottom right, within a window; out and lse float32.

    The first queries see every key up to themselves. For all later ones, a chunk of queries and its keys look like the
    next one, shifted: one masked call takes all chunks as a batch, over views of K and V that overlap.
    """
    sq, past = q.shape[0], k.shape[0] - q.shape[0]
    first = min(sq, max(0, window - past))
    parts = []
    if first:
        end = past + first
        parts.append(decode_by_parts(attend, q[:first], k[:end], v[:end], scale, causal=True))
    whole = (sq - first) // CHUNK * CHUNK
    for start, stop, size in ((first, first + whole, CHUNK), (first + whole, sq, sq - first - whole)):
        if stop > start:
            keys = slice(past + start - window + 1, past + stop)
            parts.append(_chunks(masked, q[start:stop], k[keys], v[keys], scale, size))
    outs, lses = zip(*parts, strict=True)
    return (outs[0], lses[0]) if len(parts) == 1 else (torch.cat(outs), torch.cat(lses))


def _chunks(masked: MaskedAttend, q: Tensor, k: Tensor, v: Tensor, scale: float, size: int) -> tuple[Tensor, Tensor]:
    """Queries in chunks of `size`: the first has the keys k[: window - 1 + size], the next those `size` further."""
    sq, b, heads, hn = q.shape
    before = k.shape[0] - sq
    offset = torch.arange(size + before, device=q.device) - torch.arange(size, device=q.device)[:, None]
    mask = torch.zeros(size, size + before, dtype=q.dtype, device=q.device)
    mask.masked_fill_((offset < 0) | (offset > before), float("-inf"))
    # Sequences of the batch become heads: the chunks take the place of the batch.
    queries = q.flatten(1, 2).unflatten(0, (sq // size, size)).transpose(1, 2)
    keys, values = (x.flatten(1, 2).unfold(0, size + before, size).transpose(2, 3) for x in (k, v))
    out, lse = masked(queries, keys, values, mask, scale)
    out = out.transpose(1, 2).reshape(sq, b, heads, hn)
    return out.float(), lse.transpose(1, 2).reshape(sq, b, heads).float()
