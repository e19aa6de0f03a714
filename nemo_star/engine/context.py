"""An encoded context, and the sequences (query and generated tokens) that hang on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_star.attention.cache import KVCache
from nemo_star.methods.method import Method
from nemo_star.methods.partition import Block, Partition, Span


@dataclass
class EncodedContext:
    """The K/V of one context on this rank: read by all sequences that hang on it, changed by none.

    Only going on (`Engine.extend`) adds to it. Its memory is given back when nothing refers to it any more.
    """

    ids: Tensor
    """[tokens] int32 on CPU, of the whole context, on every rank."""
    cache: KVCache
    """This rank's share, for the layers of its pipeline stage; windowed layers hold the last tokens only."""
    partition: Partition
    """Which cp rank holds what."""
    method: Method
    """It was encoded with, sizes settled."""
    seconds: float = 0.0
    """Encoding took on this rank."""
    waited_seconds: float = 0.0
    """Of these, for K/V of other ranks (CPU; a GPU waits in its own queue)."""
    revision: int = 0
    """How often it has gone on."""

    @property
    def tokens(self) -> int:
        """Length of the whole context."""
        return self.partition.context_tokens

    def cut(self, tokens: int, cp_rank: int) -> None:
        """Take away what comes after the first `tokens` tokens, which must be the end of a block."""
        kept = [tuple(block for block in blocks if block.spans[-1][1] <= tokens) for blocks in self.partition.ranks]
        shorter = Partition(tokens, tuple(kept))
        self.cache.drop(self.partition.tokens_of(cp_rank) - shorter.tokens_of(cp_rank))
        self.partition, self.ids = shorter, self.ids[:tokens]

    def goes_on(self, ids: Tensor, added: Partition) -> None:
        """Further tokens were encoded, in the blocks of `added` after those of each rank."""
        ranks = tuple((*old, *new) for old, new in zip(self.partition.ranks, added.ranks, strict=True))
        self.partition, self.ids = Partition(added.context_tokens, ranks), ids
        self.revision += 1


@dataclass
class Sequence:
    """Query and generated tokens after one context. Their K/V lie beside the context's, dealt out over the cp ranks."""

    context: EncodedContext
    cache: KVCache
    """This rank's share of the sequence's own K/V."""
    own_tokens_by_rank: list[int]
    """By cp rank; the same on all ranks."""
    runs: list[tuple[int, Span]] = field(default_factory=list)
    """cp rank that holds them, and the positions of tokens; in order, the same on all ranks."""
    revision: int = field(init=False)

    def __post_init__(self) -> None:
        self.revision = self.context.revision

    @property
    def tokens(self) -> int:
        """Own tokens so far."""
        return sum(self.own_tokens_by_rank)

    @property
    def position(self) -> int:
        """Position id of the next token."""
        return self.context.tokens + self.tokens

    def deal(self, tokens: int) -> int:
        """Give the next tokens to the cp rank that holds least of context and sequence; which."""
        held = [
            there + own
            for there, own in zip(self.context.partition.tokens_by_rank, self.own_tokens_by_rank, strict=True)
        ]
        owner, start = held.index(min(held)), self.position
        self.own_tokens_by_rank[owner] += tokens
        if self.runs and self.runs[-1][0] == owner:
            start = self.runs.pop()[1][0]
        self.runs.append((owner, (start, self.position)))
        return owner

    def truncate(self, tokens: int, cp_rank: int) -> None:
        """Roll back to the first `tokens` own tokens."""
        end = self.context.tokens + tokens
        while self.runs and self.runs[-1][1][1] > end:
            owner, (start, stop) = self.runs.pop()
            self.own_tokens_by_rank[owner] -= stop - max(start, end)
            if start < end:
                self.runs.append((owner, (start, end)))
        self.cache.truncate(self.own_tokens_by_rank[cp_rank])

    def fork(self) -> Sequence:
        """Another one that goes on from here."""
        forked = Sequence(self.context, self.cache.copy(), list(self.own_tokens_by_rank), copy.copy(self.runs))
        forked.revision = self.revision
        return forked

    def own_spans_backwards(self, cp_rank: int) -> Iterator[Span]:
        """Positions of the tokens in `cache`, the last ones first."""
        return (span for owner, span in reversed(self.runs) if owner == cp_rank)


def positions_from(backwards: Iterator[Span], first: int) -> Tensor:
    """[found] int64 on CPU: those of the positions that are `first` or later, in order; the spans come with the last
    ones first."""
    found: list[Tensor] = []
    for start, stop in backwards:
        if stop <= first:
            break
        found.append(torch.arange(max(start, first), stop))
    return torch.cat(found[::-1]) if found else torch.empty(0, dtype=torch.int64)


def block_spans_backwards(blocks: tuple[Block, ...]) -> Iterator[Span]:
    """Of a rank's blocks."""
    return (span for block in reversed(blocks) for span in reversed(block.spans))
