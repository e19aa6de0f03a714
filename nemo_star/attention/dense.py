"""Dense attention: the whole context is one block; exact, and the yardstick of the other methods."""

from __future__ import annotations

from torch import Tensor

from nemo_star.attention.core import CoreAttention
from nemo_star.attention.step import PrefillStep


class DenseAttention(CoreAttention):
    """Causal attention over the whole context on one rank."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, step: PrefillStep) -> Tensor:
        self.keep(k, v, step)
        return self.attend(q, k, v)
