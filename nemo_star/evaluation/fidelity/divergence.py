"""Two next-token distributions beside each other."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Divergences:
    """By position, in order."""

    kl: list[float] = field(default_factory=list)
    """KL(reference || other), nats."""
    agree: list[bool] = field(default_factory=list)
    """Whether both have the same likeliest token."""

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Further positions, reduced at once: logits of a long answer over a large vocabulary are not kept.

        Args:
            reference: logits [positions, vocab], any float type.
            other: the same of what is measured.
        """
        ours, theirs = (logits.double().log_softmax(dim=-1) for logits in (reference, other))
        kl = torch.nn.functional.kl_div(theirs, ours, reduction="none", log_target=True).sum(dim=-1)
        self.kl += kl.clamp_min(0.0).tolist()  # below 0 by rounding only
        self.agree += (reference.argmax(dim=-1) == other.argmax(dim=-1)).tolist()
