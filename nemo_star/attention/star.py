"""Star Attention: anchored local prefill, global decode (arXiv 2411.17116, section 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_star.attention.anchor import SharedAnchor
from nemo_star.attention.cache import KVCache, KVShape
from nemo_star.attention.core import CoreAttention
from nemo_star.attention.step import Handover, PrefillStep
from nemo_star.methods.method import Method
from nemo_star.methods.partition import Partition
from nemo_star.methods.star import Star


class StarAttention(CoreAttention):
    """Phase 1 of the paper: a block attends causally to itself, and in full to the anchor before it.

    Either the anchor's tokens are in flight with the block, as the paper has it (`anchor=recompute`: the tokens are
    [anchor | block] and only the block's K/V are kept), or its K/V come from the rank that computed them
    (`anchor=shared`: only the block's tokens are in flight). A windowed layer has no anchor: a block sees the tokens
    right before it.
    """

    @classmethod
    def handover(
        cls,
        method: Method,
        partition: Partition,
        group: dist.ProcessGroup,
        *,
        shape: KVShape,
        layer_numbers: Sequence[int],
        cache: KVCache,
    ) -> Handover | None:
        """The anchor's K/V, where later blocks want them; None where each computes its own."""
        assert isinstance(method, Star)
        anchor_size = method.sizes(partition.context_tokens)[1]
        blocks = [block for blocks in partition.ranks for block in blocks]
        if not method.shares_anchor or not any(block.sees for block in blocks):
            return None
        return SharedAnchor(
            group,
            shape,
            tokens=anchor_size,
            layer_numbers=layer_numbers,
            blocks_left=sum(block.index > 0 for block in partition.ranks[group.rank()]),
            ahead=not method.in_rounds,
            cached=None if any(block.index == 0 for block in blocks) else cache,
        )

    def accompany(self, step: PrefillStep, like: Tensor) -> None:
        if self.window is not None:
            assert step.preceding is not None
            step.preceding.before(self.layer_number, like, like, step.number)
        elif isinstance(step.handover, SharedAnchor):
            step.handover.pass_by(self.layer_number)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, step: PrefillStep) -> Tensor:
        again = k.shape[0] - step.block.tokens  # the anchor's tokens, where each block recomputes them
        if self.window is not None:
            out = self.prefill_windowed(q[again:], k[again:], v[again:], step)
            return torch.cat((self.attend(q[:again], k[:again], v[:again]), out)) if again else out
        self.keep(k[again:], v[again:], step)
        if isinstance(step.handover, SharedAnchor):
            if step.block.index == 0:
                step.handover.give(self.layer_number, k, v)
            else:
                anchor_k, anchor_v = step.handover.take(self.layer_number)
                k, v = torch.cat((anchor_k, k)), torch.cat((anchor_v, v))
        return self.attend(q, k, v)
