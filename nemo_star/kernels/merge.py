"""Exact merge of partial attention results by log-sum-exp.

A partial result is softmax attention over some of the keys: `out` [sq, b, np, hn] and `lse` [sq, b, np], the natural
log of the sum of exponentiated, scaled scores. With `lse = logsumexp_r lse_r` the attention over all keys is
`sum_r exp(lse_r - lse) * out_r` (arXiv 2411.17116, section 2.2; derivation as in FlashAttention, arXiv 2205.14135,
section 3.1). No term is exponentiated before the largest lse is subtracted, so no gap between them overflows; one
without keys has `lse = -inf` and takes no share. All of it in float32.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


def merge_partials(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial results over their first dimension.

    Args:
        outs: [partials, sq, b, np, hn], any float type.
        lses: [partials, sq, b, np] float32; -inf where one holds no key.

    Returns:
        out [sq, b, np, hn] and lse [sq, b, np], float32. Without any key: out 0, lse -inf.
    """
    lse = torch.logsumexp(lses, dim=0)
    # Where every partial is empty, -inf - -inf would be nan: any finite value gives the weights 0 that are meant.
    weights = torch.exp(lses - lse.masked_fill(lse.isneginf(), 0.0))
    # An empty partial's out is whatever its kernel left there; 0 * nan is nan, so it is masked, not weighted.
    filled = outs.float().masked_fill(lses.isneginf().unsqueeze(-1), 0.0)
    return (weights.unsqueeze(-1) * filled).sum(dim=0), lse


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention whose softmax has one more score, which adds nothing: a head's sink (arXiv 2309.17453; gpt-oss).

    Args:
        out: [sq, b, np, hn], over all keys: a sink enters once, after everything is merged.
        lse: [sq, b, np].
        sinks: [np].

    Returns:
        out / (1 + exp(sink - lse)), float32.
    """
    return out.float() * torch.sigmoid(lse - sinks.float()).unsqueeze(-1)


class Merge(Protocol):
    """What `merge_with_sinks` computes."""

    def __call__(
        self, outs: Tensor, lses: Tensor, sinks: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]: ...


def merge_with_sinks(outs: Tensor, lses: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Decode's last step by torch's operations: `merge_partials`, then `with_sinks` where there are some.

    Args:
        outs, lses: as in `merge_partials`.
        sinks: [np]; None: none.
        dtype: of the result.

    Returns:
        out [sq, b, np, hn] of `dtype`; lse [sq, b, np] float32, of the keys alone.
    """
    out, lse = merge_partials(outs, lses)
    return (out if sinks is None else with_sinks(out, lse, sinks)).to(dtype), lse


def merge_by_triton(outs: Tensor, lses: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same as one kernel instead of about fifteen: on a GPU each waits for Python to launch it."""
    from nemo_star.kernels.triton_merge import merge

    return merge(outs, lses, sinks, dtype)
