"""Star Attention: anchored local prefill, global decode (arXiv 2411.17116, section 2)."""

from __future__ import annotations

from torch import Tensor

from nemo_star.attention.core import CoreAttention
from nemo_star.partition import Block


class StarAttention(CoreAttention):
    """Phase 1 of the paper, the anchor recomputed with every block, as the paper does.

    The tokens in flight are [anchor | block]: one causal attention over both. The anchor's K/V are those of block 0,
    which its own rank caches: here only the block's are kept.
    """

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        anchor_tokens = k.shape[0] - block.tokens
        self.state.cache.append(self.layer_number, k[anchor_tokens:], v[anchor_tokens:])
        return self.state.kernel.prefill(q, k, v, self.scale)
