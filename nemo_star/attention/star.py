"""Star Attention: anchored local prefill, global decode (arXiv 2411.17116, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_star.attention.core import CoreAttention
from nemo_star.methods.partition import Block


class StarAttention(CoreAttention):
    """Phase 1 of the paper: a block attends causally to itself, and in full to the anchor before it.

    Either the anchor's tokens are in flight with the block, as the paper has it (`anchor=recompute`: the tokens are
    [anchor | block] and only the block's K/V are kept), or its K/V come from the rank that computed them
    (`anchor=shared`: only the block's tokens are in flight).
    """

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        state = self.state
        recomputed = k.shape[0] - block.tokens
        state.cache.append(self.layer_number, k[recomputed:], v[recomputed:])
        if state.anchor is not None:
            if block.index == 0:
                state.anchor.give(self.layer_number, k, v)
            else:
                anchor_k, anchor_v = state.anchor.take(self.layer_number)
                k, v = torch.cat((anchor_k, k)), torch.cat((anchor_v, v))
        return state.kernel.prefill(q, k, v, self.scale)
