"""An encoded context, and the sequences (query and generated tokens) that hang on it."""

from __future__ import annotations

from collections.abc import Sequence as Spans
from dataclasses import dataclass, field

from nemo_star.attention.cache import KVCache
from nemo_star.methods.method import Method
from nemo_star.methods.partition import Partition, Span


@dataclass(frozen=True)
class EncodedContext:
    """The K/V of one context on this rank: read by all sequences that hang on it, changed by none.

    Its memory is given back when nothing refers to it any more.
    """

    cache: KVCache
    """This rank's share, for the layers of its pipeline stage."""
    partition: Partition
    """Which cp rank holds what."""
    method: Method
    """It was encoded with."""
    seconds: float
    """Encoding took on this rank."""
    waited_seconds: float = 0.0
    """Of these, for K/V of other ranks (CPU; a GPU waits in its own queue)."""

    @property
    def tokens(self) -> int:
        """Length of the whole context."""
        return self.partition.context_tokens


@dataclass
class Sequence:
    """Query and generated tokens after one context. Their K/V lie beside the context's, dealt out over the cp ranks."""

    context: EncodedContext
    cache: KVCache
    """This rank's share of the sequence's own K/V."""
    own_tokens_by_rank: list[int] = field(default_factory=list)
    """By cp rank; the same on all ranks."""
    own_spans: list[Span] = field(default_factory=list)
    """Positions of the tokens in `cache`, in order."""

    @property
    def position(self) -> int:
        """Position id of the next token."""
        return self.context.tokens + sum(self.own_tokens_by_rank)

    def deal(self, tokens: int) -> int:
        """Give the next tokens to the cp rank that holds least of context and sequence; which."""
        held = [
            there + own
            for there, own in zip(self.context.partition.tokens_by_rank, self.own_tokens_by_rank, strict=True)
        ]
        owner = held.index(min(held))
        self.own_tokens_by_rank[owner] += tokens
        return owner

    def cached(self, start: int, stop: int) -> None:
        """The next tokens in `cache` have the positions start to stop."""
        if self.own_spans and self.own_spans[-1][1] == start:
            start = self.own_spans.pop()[0]
        self.own_spans.append((start, stop))


def positions_from(spans: Spans[Span], first: int) -> list[int]:
    """Those of the positions that are `first` or later; the spans are in order."""
    found: list[int] = []
    for start, stop in reversed(spans):
        if stop <= first:
            break
        found[:0] = range(max(start, first), stop)
    return found
