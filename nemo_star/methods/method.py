"""What an attention method has to say of itself, without torch: engine, planner, benchmark and command line ask it,
and know no names.

Its prefill is a module of its own (`Method.attention`), a subclass of `nemo_star.attention.core.CoreAttention`.
Decode is the same for all methods, because all leave the context's K/V sharded over the cp ranks.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.partition import Block, Partition, Span, band, length, triangle

CountedBlock = tuple[Block, int]
"""A block, and how many of a rank's blocks are like it."""


@dataclass(frozen=True)
class Heads:
    """Attention heads of one tensor-parallel rank, in elements of a token."""

    query: float
    """np * hn."""
    kv: float
    """ng * hn: keys, or values."""
    groups: float


@dataclass(frozen=True)
class Share:
    """What one cp rank has of a context."""

    context_tokens: int
    cp_size: int
    num_blocks: int
    """Of this rank."""
    all_blocks: int
    """Of the context."""


@dataclass(frozen=True)
class Exchange:
    """What one layer exchanges over cp for one block, for the planner's clock: `times` messages of `elements` each."""

    elements: float
    """Sent by a rank, in the model's type."""
    ranks: int
    """That take part in one of them: 2 for a neighbour."""
    times: int = 1
    blocks: int = 1
    """Blocks of the rank that it serves."""
    beside_attention: float = 0.0
    """Share of the layer's attention that runs at the same time as one of them."""
    beside_layer: float = 0.0
    """The same of all that the layer computes."""


class Method(ABC):
    """One attention method with its settings."""

    kind: ClassVar[str]
    attention: ClassVar[str]
    """`module:Class` of its core attention."""
    exact: ClassVar[bool] = True
    """Gives what dense attention gives."""
    shares_context: ClassVar[bool] = True
    """Whether several cp ranks can share a context."""
    has_blocks: ClassVar[bool] = False
    """Whether `attention.block_size` decides how the context is cut."""
    takes_windows: ClassVar[bool] = False
    """Whether its attention has windowed layers and sinks (`CoreAttention.prefill_windowed`, `attend`)."""
    variants: ClassVar[tuple[str, ...]] = ()
    """Values of `attention.anchor` that it tells apart: `compare` takes `kind:variant`."""
    ablates_anchor: ClassVar[bool] = False
    """Whether `attention.anchor_content` and `attention.anchor_positions` decide what its blocks see."""
    overlaps: ClassVar[bool] = False
    """Whether its blocks may overlap (`attention.overlap_size`)."""

    def __init__(self, settings: AttentionConfig) -> None:
        self.settings = settings

    @property
    def overlap_size(self) -> int:
        """Tokens that a block overlaps with, at most."""
        return self.settings.overlap_size if self.overlaps else 0

    @property
    def variant(self) -> str | None:
        return self.settings.anchor if self.variants else None

    def resized(self, block_size: int) -> Method:
        """The same with blocks (and an anchor) of another size."""
        resized = copy.copy(self)
        resized.settings = dataclasses.replace(self.settings, block_size=block_size, anchor_size=block_size)
        return resized

    def with_windows(self) -> Method:
        """For a model with windowed layers, where blocks see what comes right before them.

        Raises:
            ValueError: the method has none.
        """
        if not self.takes_windows:
            raise ValueError(f"attention={self.kind} does not take models with windowed layers or sinks")
        return self

    def pinned(self, context_tokens: int) -> Method:
        """The same with the sizes that a context of this length has, which stay when the context goes on."""
        return self

    # How the context is dealt out

    def sizes(self, context_tokens: int) -> tuple[int, int]:
        """(block size, anchor size) in tokens for a context of this length.

        Raises:
            ValueError: settings that do not go together at this length.
        """
        return context_tokens, 0

    @abstractmethod
    def partition(self, context_tokens: int, cp_size: int) -> Partition:
        """How a context of this length is cut, and dealt out over the cp ranks."""

    def goes_on_from(self, context_tokens: int) -> int:
        """First token that is encoded again when a context of this length goes on."""
        return context_tokens

    def windowed_from(self, context_tokens: int, window: int | None) -> int:
        """First token of a context that its windowed layers hold: what a query sees, and what goes on from its last
        block; without windows, none."""
        if window is None:
            return context_tokens
        return max(0, self.goes_on_from(context_tokens) - self.overlap_size - (window - 1))

    def going_on(self, partition: Partition, context_tokens: int) -> Partition | None:
        """The blocks, by rank, that bring a context to this length, from `goes_on_from` on; None: tokens that go on see
        everything before them, as in decode.

        Args:
            partition: of the context so far, less what is encoded again.
        """
        return None

    def check_heads(self, heads: int, groups: int, cp_size: int) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse head counts of one tensor-parallel rank that cp ranks cannot share.

        Raises:
            ValueError: names the numbers.
        """

    def describe(self, context_tokens: int) -> str:
        """How a context of this length is cut, for a person; empty where it is not."""
        return ""

    def warning(self, context_tokens: int) -> str | None:
        """Of settings that run and are hardly meant."""
        return None

    # What a block computes

    def in_flight(self, block: Block) -> tuple[Span, ...]:
        """Spans of the context that run through the layers for a block, in order, its own last."""
        return block.spans

    def pairs(self, block: Block) -> int:
        """(query, key) pairs of one layer for one block; here: each token attends to the whole context before it."""
        return sum(triangle(stop) - triangle(start) for start, stop in block.spans)

    def windowed_pairs(self, block: Block, window: int) -> int:
        """The same of a windowed layer, in which a token sees itself and the `window - 1` before it."""
        return sum(band(stop, window) - band(start, window) for start, stop in self.in_flight(block))

    def rank_pairs(self, block: Block, share: Share) -> float:
        """`pairs` as what the block's rank computes with all its heads' worth of work."""
        return self.pairs(block)

    def rank_windowed_pairs(self, block: Block, share: Share, window: int) -> float:
        """The same of `windowed_pairs`."""
        return self.windowed_pairs(block, window)

    # What the planner asks: the work of a rank, as the blocks that differ

    def rank_blocks(self, context_tokens: int, cp_size: int, cp_rank: int) -> list[CountedBlock]:
        """The blocks of a rank, those alike counted. Where blocks can be many: without making them one by one."""
        return [(block, 1) for block in self.partition(context_tokens, cp_size).ranks[cp_rank]]

    def all_blocks(self, context_tokens: int, cp_size: int) -> list[CountedBlock]:
        """All blocks of the context, those alike counted."""
        return [(block, 1) for blocks in self.partition(context_tokens, cp_size).ranks for block in blocks]

    def all_windowed_pairs(self, context_tokens: int, cp_size: int, window: int) -> int:
        """`windowed_pairs` of all blocks, none taken for another: those near the start see less than a window."""
        return sum(
            count * self.windowed_pairs(block, window) for block, count in self.all_blocks(context_tokens, cp_size)
        )

    def num_blocks(self, context_tokens: int, cp_size: int) -> int:
        return sum(count for _, count in self.all_blocks(context_tokens, cp_size))

    def tokens_by_rank(self, context_tokens: int, cp_size: int) -> list[int]:
        """Context tokens whose K/V each cp rank caches."""
        return self.partition(context_tokens, cp_size).tokens_by_rank

    def ranks_to_plan(self, context_tokens: int, cp_size: int) -> list[int]:
        """The cp ranks that could be the slowest or the fullest; every other one is like one of them."""
        ranks = self.partition(context_tokens, cp_size).ranks
        work = [sum(map(self.pairs, blocks)) for blocks in ranks]
        held = [sum(block.tokens for block in blocks) for blocks in ranks]
        return sorted({work.index(max(work)), held.index(max(held))})

    def exchanges(self, block: Block, share: Share, heads: Heads) -> list[Exchange]:
        """What a layer exchanges over several cp ranks for a block."""
        return []

    def windowed_exchanges(self, block: Block, share: Share, heads: Heads, window: int) -> list[Exchange]:
        """The same of a windowed layer: K and V of the tokens right before the block."""
        return [Exchange(2 * heads.kv * min(window - 1, share.context_tokens), 2)]

    def attention_bytes(self, tokens: int, share: Share, heads: Heads, itemsize: int) -> float:
        """Bytes beside q, k, v and the output while a layer attends: buffers of exchanges, keys joined to others.

        Args:
            tokens: of the rank's longest forward pass.
            itemsize: of the model's type.
        """
        return 0.0

    def kept_bytes(self, share: Share, heads: Heads, itemsize: int, *, layers: int) -> float:
        """Bytes that stay through a prefill beside the rank's own K/V; `layers` are those of its pipeline stage."""
        return 0.0

    def tokens_in_flight(self, block: Block) -> int:
        """Tokens that run through the layers for a block."""
        return length(self.in_flight(block))
