"""The merge of partial attention results over the cp group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_star.kernels.merge import merge_partials
from nemo_star.parallel.groups import all_gather


def merge_over_group(outs: Tensor, lses: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Merge every rank's partial results over the keys it holds; one all-gather, the same bits on every rank.

    Args:
        outs: [partials, sq, b, np, hn], float32.
        lses: [partials, sq, b, np], float32, -inf where a partial has no keys.

    Returns:
        out [sq, b, np, hn] and lse [sq, b, np], float32.
    """
    if group.size() > 1:
        gathered = all_gather(torch.cat((outs, lses.unsqueeze(-1)), dim=-1), group).flatten(0, 1)
        outs, lses = gathered[..., :-1], gathered[..., -1]
    return merge_partials(outs, lses)
