"""How the context attends: the `attention` group of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AnchorContent = Literal["first", "previous", "constant", "random", "shuffled"]
AnchorPositions = Literal["first", "previous", "random"]
MAX_CHUNK_SIZE = 4096


@dataclass(frozen=True)
class AttentionConfig:
    """How the context attends. Sizes are in tokens; a method keeps fields it does not use."""

    kind: str = "star"
    """A method of `nemo_star/methods/`, or `package.module.Class` of a `Method` of your own."""
    block_size: int | None = None
    """Tokens of one context block; None: ceil(context / 4), at most 32,768."""
    anchor_size: int | None = None
    """Tokens of the anchor, the start of the first block; None: the block size; 0: no anchor. Of a summary: its tokens
    at most; None: a quarter of the block size."""
    anchor: Literal["shared", "recompute"] = "shared"
    """`shared` computes the anchor once and hands its K/V to the other ranks; `recompute` runs its tokens through the
    model again for every block, as the paper does. Same result up to rounding."""
    anchor_content: AnchorContent = "first"
    """Which tokens stand in the anchor's place (star; the paper's ablation): the `first` block's; those right before
    the block (`previous`); the most frequent one of the first block's, again and again (`constant`); `random` ones of
    the vocabulary; the first block's in random order (`shuffled`). Others than `first` need anchor=recompute."""
    anchor_positions: AnchorPositions = "first"
    """Position ids of the anchor (star; the paper's ablation): those of the `first` block; those right before the block
    (`previous`); drawn from all before the block (`random`). Others than `first` need anchor=recompute."""
    overlap_size: int = 0
    """Tokens right before a block that run through the layers with it, once more, and are not kept (star): what an edge
    between blocks would cut in two, such as a sentence, is seen whole by the block that has its end. Tokens of the
    anchor are left out, being seen anyway. At most block_size; where that follows from the context, one block."""
    sink_size: int = 4
    """Tokens at the start of the context that every block sees (summary)."""
    chunk_size: int = 32
    """Tokens of a chunk, of which the summary is made (summary)."""
    kernel: Literal["auto", "te", "flash", "triton", "numba", "cpu", "math"] = "auto"
    """What computes attention over the keys that a rank holds; `auto` takes the first that runs. `te` is for
    prefill: decode goes to `flash` beside it, which need not plan for each new length. `triton` is for decode: prefill
    goes to `flash` beside it."""

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
        if self.overlap_size < 0:
            raise ValueError(f"attention.overlap_size={self.overlap_size} must be 0 (no overlap) or more tokens")
        if self.block_size is not None and self.overlap_size > self.block_size:
            raise ValueError(
                f"attention.overlap_size={self.overlap_size} is larger than attention.block_size={self.block_size}: "
                "a block overlaps the one before it"
            )
        if self.sink_size < 0:
            raise ValueError(f"attention.sink_size={self.sink_size} must be 0 (no sink) or more tokens")
        if not 1 <= self.chunk_size <= MAX_CHUNK_SIZE:
            raise ValueError(f"attention.chunk_size={self.chunk_size} must be 1 to {MAX_CHUNK_SIZE} tokens")
