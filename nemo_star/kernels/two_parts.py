"""Attention put together from parts that every library has: unmasked, and causal over a square.

Libraries differ in where they align a causal mask when there are more keys than queries, and in which lengths and masks
they take. Two parts are the same everywhere, and their merge by log-sum-exp is exact:

    past   the keys before the queries' own, seen by every query: unmasked
    own    the last sq keys, one for each query: causal over a square

Shapes as in `nemo_star.kernels.registry`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nemo_star.kernels.merge import merge_partials


class Attend(Protocol):
    """One call of a library: out [sq, b, np, hn] of any float type, lse [sq, b, np] float32.

    Called with sq == sk where `causal`, and never without keys.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]: ...


def no_keys(q: Tensor) -> tuple[Tensor, Tensor]:
    """The result over no keys: out 0, lse -inf."""
    return q.new_zeros(q.shape, dtype=torch.float32), q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float32)


def decode_by_parts(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """A kernel's `decode` by calls of `attend`; out and lse float32."""
    sq, sk = q.shape[0], k.shape[0]
    if sk == 0:
        return no_keys(q)
    if not causal or sq == 1:
        return unmasked(attend, q, k, v, scale)
    own_out, own_lse = attend(q, k[sk - sq :], v[sk - sq :], scale, True)
    if sk == sq:
        return own_out.float(), own_lse
    past_out, past_lse = unmasked(attend, q, k[: sk - sq], v[: sk - sq], scale)
    return merge_partials(torch.stack((past_out, own_out.float())), torch.stack((past_lse, own_lse)))


def unmasked(attend: Attend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Unmasked attention with the query heads of a group folded into the query length; out and lse float32.

    K/V are then read once per group instead of once per query head: in decode, where reading them is all the work, the
    difference is the group's size.
    """
    sq, b, heads, hn = q.shape
    ng = k.shape[2]
    folded = q.view(sq, b, ng, heads // ng, hn).permute(0, 3, 1, 2, 4).reshape(sq * (heads // ng), b, ng, hn)
    out, lse = attend(folded, k, v, scale, False)
    out = out.reshape(sq, heads // ng, b, ng, hn).permute(0, 2, 3, 1, 4).reshape(sq, b, heads, hn)
    lse = lse.reshape(sq, heads // ng, b, ng).permute(0, 2, 3, 1).reshape(sq, b, heads)
    return out.float(), lse
