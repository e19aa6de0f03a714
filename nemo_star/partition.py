"""Context -> blocks -> context-parallel ranks. Pure Python, no torch.distributed.

Star Attention, phase 1 (arXiv 2411.17116, section 2.1): the context is cut into blocks of `block_size` tokens; block 0
attends causally to itself, every later block to itself and to the anchor, the first `anchor_size` tokens of block 0.
Position ids are those of the whole context everywhere: the anchor's stay 0..anchor_size-1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Tokens [start, stop) of the context, and how many anchor tokens its attention sees before them."""

    index: int
    start: int
    stop: int
    anchor_size: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Partition:
    """All blocks of one context, dealt to `cp_size` ranks: contiguous, the first ranks one block more."""

    context_tokens: int
    block_size: int
    anchor_size: int
    cp_size: int

    def __post_init__(self) -> None:
        if self.context_tokens < 1:
            raise ValueError("the context is empty: give at least 1 token")
        if not 0 <= self.anchor_size <= self.block_size or self.block_size < 1:
            raise ValueError(
                f"anchor size {self.anchor_size} and block size {self.block_size} do not fit: "
                "0 <= anchor <= block and block >= 1 token"
            )

    @property
    def num_blocks(self) -> int:
        return -(-self.context_tokens // self.block_size)

    def block(self, index: int) -> Block:
        start = index * self.block_size
        stop = min(start + self.block_size, self.context_tokens)
        return Block(index, start, stop, anchor_size=0 if index == 0 else self.anchor_size)

    def blocks_of(self, cp_rank: int) -> list[Block]:
        """The blocks of a rank, in order; empty where there are more ranks than blocks."""
        share, extra = divmod(self.num_blocks, self.cp_size)
        first = cp_rank * share + min(cp_rank, extra)
        return [self.block(first + i) for i in range(share + (cp_rank < extra))]

    def tokens_of(self, cp_rank: int) -> int:
        """Context tokens whose K/V the rank caches."""
        return sum(block.tokens for block in self.blocks_of(cp_rank))
