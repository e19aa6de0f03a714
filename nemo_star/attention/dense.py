"""Dense attention: the whole context is one block; exact, and the yardstick of the other kinds."""

from __future__ import annotations

from torch import Tensor

from nemo_star.attention.core import CoreAttention
from nemo_star.methods.partition import Block


class DenseAttention(CoreAttention):
    """Causal attention over the whole context on one rank."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        self.state.cache.append(self.layer_number, k, v)
        return self.state.kernel.prefill(q, k, v, self.scale)
