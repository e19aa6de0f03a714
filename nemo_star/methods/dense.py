"""Dense attention: the whole context is one block on one rank; exact, and the yardstick of the other methods."""

from __future__ import annotations

from nemo_star.methods.method import Method
from nemo_star.methods.partition import Partition, contiguous


class Dense(Method):
    """Causal attention over the whole context."""

    kind = "dense"
    attention = "nemo_star.attention.dense:DenseAttention"
    shares_context = False
    takes_windows = True

    def partition(self, context_tokens: int, cp_size: int) -> Partition:
        return contiguous(context_tokens, cp_size)
