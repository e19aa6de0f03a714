"""How the context attends: the `attention` group of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ATTENTION_KINDS = ("star", "dense", "ring", "ulysses")
DEFAULT_BLOCKS = 4
MAX_DEFAULT_BLOCK_SIZE = 32768
SMALL_BLOCK_TOKENS = 16


@dataclass(frozen=True)
class AttentionConfig:
    """How the context attends (paper section 2). Sizes are in tokens; a kind keeps fields it does not use."""

    kind: str = "star"
    block_size: int | None = None
    """Tokens of one context block; None: ceil(context / 4), at most 32,768."""
    anchor_size: int | None = None
    """Tokens of the anchor, the start of the first block; None: the block size; 0: no anchor."""
    anchor: Literal["shared", "recompute"] = "shared"
    """`shared` computes the anchor once and hands its K/V to the other ranks; `recompute` runs its tokens through the
    model again for every block, as the paper does. Same result up to rounding."""
    kernel: Literal["auto", "te", "flash", "cpu", "math"] = "auto"

    def __post_init__(self) -> None:
        if self.kind not in ATTENTION_KINDS:
            raise ValueError(f"attention.kind={self.kind!r} is unknown; known kinds: {', '.join(ATTENTION_KINDS)}")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"attention.block_size={self.block_size} must be at least 1 token")
        if self.anchor_size is not None and self.anchor_size < 0:
            raise ValueError(f"attention.anchor_size={self.anchor_size} must be 0 (no anchor) or more tokens")
        if self.block_size is not None and self.anchor_size is not None and self.anchor_size > self.block_size:
            raise ValueError(
                f"attention.anchor_size={self.anchor_size} is larger than attention.block_size={self.block_size}: "
                "the anchor is a part of the first block"
            )

    def sizes(self, context_tokens: int) -> tuple[int, int]:
        """(block size, anchor size) in tokens for a context of `context_tokens` tokens."""
        if self.kind != "star":
            return context_tokens, 0
        default = min(-(-context_tokens // DEFAULT_BLOCKS), MAX_DEFAULT_BLOCK_SIZE)
        block_size = default if self.block_size is None else self.block_size
        anchor_size = block_size if self.anchor_size is None else self.anchor_size
        if anchor_size > block_size:
            raise ValueError(
                f"attention.anchor_size={anchor_size} is larger than the block size {block_size} "
                f"(ceil({context_tokens} / {DEFAULT_BLOCKS}), because attention.block_size is not set): "
                "the anchor is a part of the first block"
            )
        return block_size, anchor_size
