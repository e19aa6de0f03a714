"""The merge of partial attention results over the cp group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_star.kernels.merge import Merge
from nemo_star.parallel.groups import all_gather


def merge_over_group(
    outs: Tensor, lses: Tensor, group: dist.ProcessGroup, *, merge: Merge, sinks: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Merge every rank's partial results over the keys it holds; one all-gather, the same bits on every rank.

    Args:
        outs: [partials, sq, b, np, hn], float32.
        lses: [partials, sq, b, np], float32, -inf where a partial has no keys.
        merge: what merges them when they are here.
        sinks: [np]; None: none.
        dtype: of the result.

    Returns:
        out [sq, b, np, hn] of `dtype`; lse [sq, b, np] float32, of the keys alone.
    """
    if group.size() > 1:
        gathered = all_gather(torch.cat((outs, lses.unsqueeze(-1)), dim=-1), group).flatten(0, 1)
        outs, lses = gathered[..., :-1], gathered[..., -1]
    return merge(outs, lses, sinks, dtype)
