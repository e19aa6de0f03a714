"""How the context attends: the `attention` group of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AttentionConfig:
    """How the context attends. Sizes are in tokens; a method keeps fields it does not use."""

    kind: str = "star"
    """A method of `nemo_star/methods/`, or `package.module.Class` of a `Method` of your own."""
    block_size: int | None = None
    """Tokens of one context block; None: ceil(context / 4), at most 32,768."""
    anchor_size: int | None = None
    """Tokens of the anchor, the start of the first block; None: the block size; 0: no anchor."""
    anchor: Literal["shared", "recompute"] = "shared"
    """`shared` computes the anchor once and hands its K/V to the other ranks; `recompute` runs its tokens through the
    model again for every block, as the paper does. Same result up to rounding."""
    kernel: Literal["auto", "te", "flash", "numba", "cpu", "math"] = "auto"
    """What computes attention over the keys that a rank holds; `auto` takes the first that runs. `te` is for
    prefill: decode goes to `flash` beside it, which need not plan for each new length."""

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"attention.block_size={self.block_size} must be at least 1 token")
        if self.anchor_size is not None and self.anchor_size < 0:
            raise ValueError(f"attention.anchor_size={self.anchor_size} must be 0 (no anchor) or more tokens")
        if self.block_size is not None and self.anchor_size is not None and self.anchor_size > self.block_size:
            raise ValueError(
                f"attention.anchor_size={self.anchor_size} is larger than attention.block_size={self.block_size}: "
                "the anchor is a part of the first block"
            )
