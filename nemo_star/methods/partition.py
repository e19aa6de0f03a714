"""Context -> blocks -> context-parallel ranks. Pure Python, no torch.distributed.

A block is what one forward pass of a rank encodes. Position ids are those of the whole context everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

Piece = tuple[int, int]
"""Tokens [start, stop) of the context."""


@dataclass(frozen=True)
class Block:
    """Pieces of the context, in order, and how many anchor tokens their attention sees before them."""

    index: int
    pieces: tuple[Piece, ...]
    anchor_size: int = 0

    @property
    def tokens(self) -> int:
        return sum(stop - start for start, stop in self.pieces)


@dataclass(frozen=True)
class Partition:
    """All blocks of one context, by the cp rank that encodes them and caches their K/V."""

    context_tokens: int
    block_size: int
    anchor_size: int
    ranks: tuple[tuple[Block, ...], ...]

    @property
    def num_blocks(self) -> int:
        return sum(len(blocks) for blocks in self.ranks)

    def tokens_of(self, cp_rank: int) -> int:
        """Context tokens whose K/V the rank caches."""
        return sum(block.tokens for block in self.ranks[cp_rank])


def star_partition(context_tokens: int, block_size: int, anchor_size: int, cp_size: int) -> Partition:
    """Star Attention, phase 1 (arXiv 2411.17116, section 2.1).

    Block 0 attends causally to itself, every later one to itself and to the anchor, the first `anchor_size` tokens of
    block 0. Blocks are dealt out contiguously, the first ranks one more; a rank may have none.
    """
    if not 0 <= anchor_size <= block_size or block_size < 1:
        raise ValueError(
            f"anchor size {anchor_size} and block size {block_size} do not fit: "
            "0 <= anchor <= block and block >= 1 token"
        )
    blocks = [
        Block(index, ((start, min(start + block_size, context_tokens)),), anchor_size if index else 0)
        for index, start in enumerate(range(0, context_tokens, block_size))
    ]
    bounds = shares(len(blocks), cp_size)
    return Partition(
        context_tokens, block_size, anchor_size, tuple(tuple(blocks[start:stop]) for start, stop in bounds)
    )


def ring_partition(context_tokens: int, block_size: int, anchor_size: int, cp_size: int) -> Partition:
    """Zigzag: of 2 * cp contiguous pieces rank r has pieces r and 2 * cp - 1 - r, so that causal work is balanced.

    Pieces differ by at most one token and may be empty: nothing is padded.
    """
    pieces = shares(context_tokens, 2 * cp_size)
    ranks = tuple((Block(rank, (pieces[rank], pieces[-1 - rank])),) for rank in range(cp_size))
    return Partition(context_tokens, block_size, anchor_size, ranks)


def contiguous_partition(context_tokens: int, block_size: int, anchor_size: int, cp_size: int) -> Partition:
    """One contiguous piece a rank, differing by at most one token: dense attention (one rank) and Ulysses."""
    pieces = shares(context_tokens, cp_size)
    ranks = tuple((Block(rank, (piece,)),) for rank, piece in enumerate(pieces))
    return Partition(context_tokens, block_size, anchor_size, ranks)


PARTITIONS: dict[str, Callable[[int, int, int, int], Partition]] = {
    "star": star_partition,
    "dense": contiguous_partition,
    "ring": ring_partition,
    "ulysses": contiguous_partition,
}
"""Attention kind -> (context tokens, block size, anchor size, cp size) -> partition."""


def shares(total: int, parts: int) -> list[Piece]:
    """`total` things in `parts` contiguous runs, the first ones one longer."""
    share, extra = divmod(total, parts)
    starts = [part * share + min(part, extra) for part in range(parts + 1)]
    return list(pairwise(starts))
