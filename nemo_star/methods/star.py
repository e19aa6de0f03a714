"""Star Attention, phase 1 (arXiv 2411.17116, section 2.1): blocks that see themselves and the anchor.

Block 0 attends causally to itself; every later block causally to itself and in full to the anchor, the first
`anchor_size` tokens of block 0, at the anchor's own positions. Blocks are dealt out contiguously, the first ranks one
more; a rank may have none. In a model with windowed layers, where a block sees what comes right before it, they are
dealt out in rounds instead (block b to rank b mod cp): neighbours run side by side, and the round before is cached.

The anchor is computed once and handed to the other ranks (`attention.anchor=shared`), or
its tokens run through the layers again with every block, as published (`recompute`).

Blocks may overlap (`attention.overlap_size`, not in the paper): the tokens right before a block run through the layers
with it, once more, so that it sees whole what its first edge cuts in two. Only the K/V of its own tokens are kept.

What stands in the anchor's place, and at which positions, can be changed as in the paper's ablation ("Position and
content of the anchor block", table 3): `attention.anchor_content`, `attention.anchor_positions`. The
published setting is the first block's tokens at the first block's positions.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import ClassVar

from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.method import CountedBlock, Exchange, Heads, Method, Share
from nemo_star.methods.partition import Block, Partition, Span, band, length, triangle

DEFAULT_BLOCKS = 4
MAX_DEFAULT_BLOCK_SIZE = 32768
SMALL_BLOCK_TOKENS = 16


class Star(Method):
    """Anchored local prefill."""

    kind = "star"
    attention = "nemo_star.attention.star:StarAttention"
    exact = False
    has_blocks = True
    takes_windows = True
    variants: ClassVar[tuple[str, ...]] = ("shared", "recompute")
    ablates_anchor = True
    overlaps = True
    in_rounds = False
    """How blocks are dealt out."""

    def __init__(self, settings: AttentionConfig) -> None:
        super().__init__(settings)
        if self._is_ablated and self.shares_anchor:
            raise ValueError(
                f"{self._ablation}: only the first block's own tokens at their own positions can be computed once for "
                "all blocks; set attention.anchor=recompute"
            )
        if self._is_ablated and self.overlap_size:
            raise ValueError(
                f"{self._ablation}: blocks that overlap see the first block's own tokens at their own positions; set "
                f"attention.overlap_size={self.overlap_size} to 0"
            )

    @property
    def _is_ablated(self) -> bool:
        settings = self.settings
        return self.ablates_anchor and (settings.anchor_content, settings.anchor_positions) != ("first", "first")

    @property
    def _ablation(self) -> str:
        return (
            f"attention.anchor_content={self.settings.anchor_content} with "
            f"attention.anchor_positions={self.settings.anchor_positions}"
        )

    def with_windows(self) -> Star:
        if self._is_ablated:
            raise ValueError(f"{self._ablation} does not take models with windowed layers or sinks")
        windowed = copy.copy(self)
        windowed.in_rounds = True
        return windowed

    def pinned(self, context_tokens: int) -> Star:
        block_size, anchor_size = self.sizes(context_tokens)
        pinned = copy.copy(self)
        pinned.settings = self._settings_of(block_size, anchor_size)
        return pinned

    def resized(self, block_size: int) -> Star:
        resized = copy.copy(self)
        resized.settings = self._settings_of(block_size, block_size)
        return resized

    def _settings_of(self, block_size: int, anchor_size: int | None) -> AttentionConfig:
        """With these sizes; an overlap is no larger than a block."""
        overlap_size = self._overlap_of(block_size)
        return dataclasses.replace(
            self.settings, block_size=block_size, anchor_size=anchor_size, overlap_size=overlap_size
        )

    def _overlap_of(self, block_size: int) -> int:
        """Tokens that blocks of this size overlap with: no more than one block."""
        return min(self.overlap_size, block_size)

    @property
    def shares_anchor(self) -> bool:
        return self.settings.anchor == "shared"

    def sizes(self, context_tokens: int) -> tuple[int, int]:
        default = min(-(-context_tokens // DEFAULT_BLOCKS), MAX_DEFAULT_BLOCK_SIZE)
        settings = self.settings
        block_size = default if settings.block_size is None else settings.block_size
        anchor_size = block_size if settings.anchor_size is None else settings.anchor_size
        if anchor_size > block_size:
            raise ValueError(
                f"attention.anchor_size={anchor_size} is larger than the block size {block_size} "
                f"(ceil({context_tokens} / {DEFAULT_BLOCKS}), because attention.block_size is not set): "
                "the anchor is a part of the first block"
            )
        return block_size, anchor_size

    def partition(self, context_tokens: int, cp_size: int) -> Partition:
        blocks = [self._block(index, context_tokens) for index in range(self.num_blocks(context_tokens, cp_size))]
        dealt = [self._numbers(len(blocks), cp_size, rank) for rank in range(cp_size)]
        return Partition(context_tokens, tuple(tuple(blocks[number] for number in numbers) for numbers in dealt))

    def goes_on_from(self, context_tokens: int) -> int:
        """The start of a short last block: it is encoded again with what fills it."""
        block_size = self.sizes(context_tokens)[0]
        return context_tokens // block_size * block_size

    def going_on(self, partition: Partition, context_tokens: int) -> Partition:
        """New blocks go to the ranks that hold least; in a model with windowed layers on in rounds."""
        block_size = self.sizes(context_tokens)[0]
        held, cp_size = list(partition.tokens_by_rank), len(partition.ranks)
        dealt: list[list[Block]] = [[] for _ in partition.ranks]
        for start in range(partition.context_tokens, context_tokens, block_size):
            block = self._block(start // block_size, context_tokens)
            rank = block.index % cp_size if self.in_rounds else held.index(min(held))
            if block.index == 0:
                rank = 0  # which hands the anchor on
            dealt[rank].append(block)
            held[rank] += block.tokens
        return Partition(context_tokens, tuple(map(tuple, dealt)))

    def describe(self, context_tokens: int) -> str:
        block_size, anchor_size = self.sizes(context_tokens)
        blocks = -(-context_tokens // block_size)
        settings = self.settings
        about: list[str] = [settings.anchor]
        if self._is_ablated:
            about += [f"content {settings.anchor_content}", f"positions {settings.anchor_positions}"]
        overlap = f", overlap of {self._overlap_of(block_size)} tokens" if self.overlap_size else ""
        return f"{blocks} blocks of {block_size} tokens, anchor of {anchor_size} tokens ({', '.join(about)}){overlap}"

    def warning(self, context_tokens: int) -> str | None:
        size = self.settings.block_size
        if size is None or size >= SMALL_BLOCK_TOKENS:
            return None
        return f"attention.block_size is {size} tokens (tokens, not K): is that meant?"

    def in_flight(self, block: Block) -> tuple[Span, ...]:
        return block.widened if self.shares_anchor else (*block.sees, *block.widened)

    def pairs(self, block: Block) -> int:
        """Causal in itself and its overlap, all of the anchor, causal in a recomputed anchor."""
        anchor, running = length(block.sees), length(block.widened)
        again = 0 if self.shares_anchor else triangle(anchor)
        return triangle(running) + running * anchor + again

    # A hundred million tokens may be a million blocks, of which four differ: the first; the second, whose overlap may
    # lie partly in the anchor; a full one; the last.

    def rank_blocks(self, context_tokens: int, cp_size: int, cp_rank: int) -> list[CountedBlock]:
        return self._counted(context_tokens, self._numbers(self.num_blocks(context_tokens, cp_size), cp_size, cp_rank))

    def all_blocks(self, context_tokens: int, cp_size: int) -> list[CountedBlock]:
        return self._counted(context_tokens, range(self.num_blocks(context_tokens, cp_size)))

    def all_windowed_pairs(self, context_tokens: int, cp_size: int, window: int) -> int:
        block_size, anchor_size = self.sizes(context_tokens)
        later = self.num_blocks(context_tokens, cp_size) - 1
        again = 0 if self.shares_anchor else later * band(anchor_size, window)
        return band(context_tokens, window) + again + self._overlapping_pairs(block_size, anchor_size, later, window)

    def _overlapping_pairs(self, block_size: int, anchor_size: int, blocks: int, window: int) -> int:
        """Of a windowed layer, those of the tokens that so many later blocks overlap with."""
        overlap = self._overlap_of(block_size)
        near = min(blocks, (window + overlap) // block_size + 1)  # whose overlap may see less than a window
        pairs = (blocks - near) * overlap * window
        for start in range(block_size, (near + 1) * block_size, block_size):
            begin = max(start - overlap, anchor_size)
            pairs += band(start, window) - band(min(begin, start), window)
        return pairs

    def num_blocks(self, context_tokens: int, cp_size: int) -> int:
        return -(-context_tokens // self.sizes(context_tokens)[0])

    def tokens_by_rank(self, context_tokens: int, cp_size: int) -> list[int]:
        block_size, blocks = self.sizes(context_tokens)[0], self.num_blocks(context_tokens, cp_size)
        dealt = [self._numbers(blocks, cp_size, rank) for rank in range(cp_size)]
        missing = blocks * block_size - context_tokens  # of the last block
        return [len(numbers) * block_size - (missing if blocks - 1 in numbers else 0) for numbers in dealt]

    def ranks_to_plan(self, context_tokens: int, cp_size: int) -> list[int]:
        blocks = self.num_blocks(context_tokens, cp_size)
        extra = blocks % cp_size
        ends = {0, 1, *((2,) if self.overlap_size else ()), extra - 1, extra, cp_size - 1, min(blocks, cp_size) - 1}
        return [rank for rank in sorted(ends) if 0 <= rank < cp_size]

    def exchanges(self, block: Block, share: Share, heads: Heads) -> list[Exchange]:
        """A broadcast of the anchor's K/V, once for all blocks of a rank, while the layer computes."""
        if not self._hands_on(share):
            return []
        anchor = self.sizes(share.context_tokens)[1]
        return [Exchange(2 * heads.kv * anchor, share.cp_size, blocks=max(1, share.num_blocks), beside_layer=1.0)]

    def attention_bytes(self, tokens: int, share: Share, heads: Heads, itemsize: int) -> float:
        """The anchor's K/V joined to a block's."""
        anchor = self.sizes(share.context_tokens)[1]
        return 2 * (tokens + anchor) * heads.kv * itemsize if self._hands_on(share) else 0.0

    def kept_bytes(self, share: Share, heads: Heads, itemsize: int, *, layers: int) -> float:
        """The anchor's K/V: of every layer until the rank's last block, else of the layer in flight and the next."""
        kept = layers if share.num_blocks > 1 else min(2, layers)
        anchor = self.sizes(share.context_tokens)[1]
        return kept * 2 * anchor * heads.kv * itemsize if self._hands_on(share) else 0.0

    def _hands_on(self, share: Share) -> bool:
        return self.shares_anchor and share.all_blocks > 1

    def _numbers(self, blocks: int, cp_size: int, cp_rank: int) -> range:
        """The blocks of a rank."""
        if self.in_rounds:
            return range(cp_rank, blocks, cp_size)
        share, extra = divmod(blocks, cp_size)
        start = cp_rank * share + min(cp_rank, extra)
        return range(start, start + share + (cp_rank < extra))

    def _counted(self, context_tokens: int, numbers: range) -> list[CountedBlock]:
        """These blocks of the context: the first, one full one for all those between (where blocks overlap, the second
        by itself), the last."""
        last = self.num_blocks(context_tokens, 1) - 1
        differ = {0, last, *((1,) if self.overlap_size else ())}
        alone = [number for number in differ if number in numbers]
        between = [number for number in numbers[:3] if number not in alone]
        counted = [(self._block(number, context_tokens), 1) for number in alone]
        if between:
            counted.append((self._block(between[0], context_tokens), len(numbers) - len(alone)))
        return sorted(counted, key=lambda block: block[0].index)

    def _block(self, index: int, context_tokens: int) -> Block:
        """The block of this number, which sees the anchor (of the first block, or right before it) and what it overlaps
        with."""
        block_size, anchor_size = self.sizes(context_tokens)
        start = index * block_size
        first = start - anchor_size if self.settings.anchor_content == "previous" else 0
        seen = ((first, first + anchor_size),) if index and anchor_size else ()
        begin = max(start - self._overlap_of(block_size), first + anchor_size)
        overlap = ((begin, start),) if index and begin < start else ()
        return Block(index, ((start, min(start + block_size, context_tokens)),), seen, overlap)
