"""Context -> blocks -> context-parallel ranks. Pure Python, no torch.distributed.

A block is what one forward pass of a rank encodes. Position ids are those of the whole context everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

Span = tuple[int, int]
"""Tokens [start, stop) of the context."""


@dataclass(frozen=True)
class Block:
    """Spans of the context, in order, whose K/V the rank keeps, and what their attention sees of the context before
    them beyond what the block itself holds (star: the anchor)."""

    index: int
    spans: tuple[Span, ...]
    sees: tuple[Span, ...] = ()
    overlap: tuple[Span, ...] = ()
    """Tokens of earlier blocks that are in flight with this one, once more, right before its own; not kept."""

    @property
    def tokens(self) -> int:
        return length(self.spans)

    @property
    def widened(self) -> tuple[Span, ...]:
        """Its spans, the first with what it overlaps with."""
        if not self.overlap:
            return self.spans
        (begin, _), (_, stop) = self.overlap[0], self.spans[0]
        return ((begin, stop), *self.spans[1:])


@dataclass(frozen=True)
class Partition:
    """All blocks of one context, by the cp rank that encodes them and caches their K/V."""

    context_tokens: int
    ranks: tuple[tuple[Block, ...], ...]

    @property
    def num_blocks(self) -> int:
        return sum(len(blocks) for blocks in self.ranks)

    def tokens_of(self, cp_rank: int) -> int:
        """Context tokens whose K/V the rank caches."""
        return sum(block.tokens for block in self.ranks[cp_rank])

    @property
    def rounds(self) -> int:
        """Blocks of the rank that has most."""
        return max(map(len, self.ranks), default=0)

    def spans_of(self, cp_rank: int) -> tuple[Span, ...]:
        """Tokens that the rank encodes, in order."""
        return tuple(span for block in self.ranks[cp_rank] for span in block.spans)

    @cached_property
    def tokens_by_rank(self) -> list[int]:
        return [self.tokens_of(rank) for rank in range(len(self.ranks))]


def length(spans: tuple[Span, ...]) -> int:
    """Tokens of all spans."""
    return sum(stop - start for start, stop in spans)


def clipped(spans: tuple[Span, ...], start: int, stop: int) -> tuple[Span, ...]:
    """What of the spans lies within [start, stop)."""
    within = ((max(first, start), min(last, stop)) for first, last in spans)
    return tuple((first, last) for first, last in within if first < last)


def shares(total: int, count: int) -> list[Span]:
    """`total` things in `count` contiguous runs, the first ones one longer."""
    share, extra = divmod(total, count)
    starts = [index * share + min(index, extra) for index in range(count + 1)]
    return list(pairwise(starts))


def triangle(tokens: int) -> int:
    """(query, key) pairs of causal attention of so many tokens to themselves."""
    return tokens * (tokens + 1) // 2


def band(tokens: int, window: int) -> int:
    """The same where a token sees itself and the `window - 1` before it."""
    near = min(tokens, window)
    return triangle(near) + (tokens - near) * window


def contiguous(context_tokens: int, cp_size: int) -> Partition:
    """One contiguous span a rank, differing by at most one token."""
    spans = shares(context_tokens, cp_size)
    return Partition(context_tokens, tuple((Block(rank, (span,)),) for rank, span in enumerate(spans)))
