"""The merge of partial attention results over the cp group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_star.kernels.merge import merge_partials
from nemo_star.parallel.groups import all_gather


def merge_over_group(out: Tensor, lse: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Merge every rank's partial result over the keys it holds; one all-gather, the same bits on every rank.

    Args:
        out: [sq, b, np, hn], float32.
        lse: [sq, b, np], float32, -inf on a rank without keys.

    Returns:
        [sq, b, np, hn], float32.
    """
    if group.size() == 1:
        return out
    parts = all_gather(torch.cat((out, lse.unsqueeze(-1)), dim=-1), group)
    return merge_partials(parts[..., :-1], parts[..., -1])[0]
