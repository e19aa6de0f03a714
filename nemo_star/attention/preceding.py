"""K/V of the tokens right before a block, which its windowed layers see: from however many blocks and ranks these are.

A windowed layer sees the `window - 1` tokens before each of its own, and no anchor, so a block needs the last of what
comes before it; where it overlaps with tokens before it, of what comes before these. Ranks go through their blocks in
rounds, and before a layer attends they exchange what others need of the blocks of this round, and of earlier ones: one
batch of sends and receives a layer. What is sent and what is taken follows from the partition, alike on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_star.attention.cache import KVCache
from nemo_star.methods.partition import Block, Partition, Span, clipped, length

Piece = tuple[Span, Tensor, Tensor]
"""Tokens of the context, and their k, v [tokens, b, ng, hn]."""


@dataclass(frozen=True)
class _Round:
    """What one rank exchanges in one round, by the cp rank of the other side."""

    own: tuple[Span, ...]
    """Tokens that its block encodes."""
    begins: tuple[int, ...]
    """Of each of these spans, with what it overlaps with."""
    sent: dict[int, tuple[Span, ...]]
    taken: dict[int, tuple[Span, ...]]
    """From itself, too."""
    kept_from: int
    """First token of the context that a later round may need."""


class PrecedingKV:
    """The exchange of one prefill on one rank.

    Args:
        group: cp.
        partition: the blocks that are encoded.
        window: tokens that a token sees, itself among them.
        cached_from: first token of the context whose K/V windowed layers cache.
        held: for a context that goes on, by cp rank: tokens before these blocks whose K/V the ranks have cached.
        cache: where they are cached, on this rank.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        partition: Partition,
        *,
        window: int,
        cached_from: int,
        held: Sequence[tuple[Span, ...]] = (),
        cache: KVCache | None = None,
    ) -> None:
        self.waited_seconds = 0.0
        self.cached_from = cached_from
        self._group = group
        self._partition = partition
        self._reach = window - 1
        self._held = held or [()] * len(partition.ranks)
        self._cache = cache
        self._rounds = [self._planned(number) for number in range(partition.rounds)]
        self._kept: dict[int, list[Piece]] = {}

    def before(self, layer_number: int, k: Tensor, v: Tensor, number: int) -> list[tuple[Tensor, Tensor]]:
        """The k, v [tokens, b, ng, hn] right before each of the block's spans, and before what it overlaps with; all
        ranks of the group ask together.

        Args:
            k, v: of the own tokens of this rank's block in round `number`, [tokens, b, ng, hn]; none, where it has no
                block.
        """
        planned = self._rounds[number]
        held = self._kept.pop(layer_number, []) if number else self._cached(layer_number, k.dtype)
        start = 0
        for span in planned.own:
            stop = start + span[1] - span[0]
            held.append((span, k[start:stop], v[start:stop]))
            start = stop
        arrived = self._exchanged(planned, held, k)
        if number + 1 < len(self._rounds):
            last = self._partition.context_tokens
            kept = _cut(held, planned.kept_from, last)
            self._kept[layer_number] = [(span, keys.clone(), values.clone()) for span, keys, values in kept]
        arrived += [piece for span in planned.taken.get(self._group.rank(), ()) for piece in _cut(held, *span)]
        arrived.sort(key=lambda piece: piece[0])
        return [self._joined(_cut(arrived, max(0, begin - self._reach), begin), k, v) for begin in planned.begins]

    def _cached(self, layer_number: int, dtype: torch.dtype) -> list[Piece]:
        """What this rank held before the first round: the last tokens of its cache."""
        spans = self._held[self._group.rank()]
        cached = self._cache.get(layer_number) if self._cache is not None and spans else None
        if cached is None:
            return []
        sizes = [stop - start for start, stop in spans]
        k, v = (x[x.shape[0] - sum(sizes) :].to(dtype, copy=True).split(sizes) for x in cached)
        return list(zip(spans, k, v, strict=True))

    def _exchanged(self, planned: _Round, held: list[Piece], like: Tensor) -> list[Piece]:
        """What other ranks send, while they are sent what they need."""
        operations, incoming = [], []
        mine = self._group.rank()
        for rank, spans in planned.sent.items():
            pieces = [piece for span in spans for piece in _cut(held, *span)]
            message = torch.stack((torch.cat([k for _, k, _ in pieces]), torch.cat([v for _, _, v in pieces])))
            operations.append(dist.P2POp(dist.isend, message, group=self._group, group_peer=rank))
        for rank, spans in planned.taken.items():
            if rank != mine:
                message = like.new_empty(2, length(spans), *like.shape[1:])
                operations.append(dist.P2POp(dist.irecv, message, group=self._group, group_peer=rank))
                incoming.append((spans, message))
        started = time.perf_counter()
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        self.waited_seconds += time.perf_counter() - started
        arrived: list[Piece] = []
        for spans, message in incoming:
            sizes = [stop - start for start, stop in spans]
            arrived += zip(spans, message[0].split(sizes), message[1].split(sizes), strict=True)
        return arrived

    def _planned(self, number: int) -> _Round:
        mine, everyone = self._group.rank(), range(len(self._partition.ranks))
        needs = {rank: self._needed(rank, number) for rank in everyone}
        held = {rank: self._available(rank, number) for rank in everyone}
        return _Round(
            own=tuple(span for span in self._block(mine, number).spans if span[0] < span[1]),
            begins=tuple(start for start, stop in self._block(mine, number).widened if start < stop),
            sent={rank: spans for rank in everyone if rank != mine and (spans := _overlap(held[mine], needs[rank]))},
            taken={rank: spans for rank in everyone if (spans := _overlap(held[rank], needs[mine]))},
            kept_from=self._kept_from(number),
        )

    def _block(self, rank: int, number: int) -> Block:
        blocks = self._partition.ranks[rank]
        return blocks[number] if number < len(blocks) else Block(-1, ())

    def _needed(self, rank: int, number: int) -> tuple[Span, ...]:
        """What a rank needs beyond its own block, each token once."""
        spans: list[Span] = []
        for start, stop in self._block(rank, number).widened:
            if start < stop:
                first = max(0, start - self._reach, spans[-1][1] if spans else 0)
                spans.append((first, max(first, start)))
        return tuple(span for span in spans if span[0] < span[1])

    def _available(self, rank: int, number: int) -> tuple[Span, ...]:
        """Tokens whose K/V a rank has when the layer attends: of this round's block, and kept of earlier ones."""
        earlier = (*self._held[rank], *(span for i in range(number) for span in self._block(rank, i).spans))
        kept = clipped(earlier, self._kept_from(number - 1) if number else 0, self._partition.context_tokens)
        return (*kept, *self._block(rank, number).spans)

    def _kept_from(self, number: int) -> int:
        later = [block for blocks in self._partition.ranks for block in blocks[number + 1 :]]
        starts = [start for block in later for start, stop in block.widened if start < stop]
        return max(0, min(starts, default=self._partition.context_tokens) - self._reach)

    @staticmethod
    def _joined(pieces: list[Piece], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not pieces:
            return k[:0], v[:0]
        return torch.cat([keys for _, keys, _ in pieces]), torch.cat([values for _, _, values in pieces])


def _overlap(spans: tuple[Span, ...], others: tuple[Span, ...]) -> tuple[Span, ...]:
    return tuple(span for start, stop in others for span in clipped(spans, start, stop))


def _cut(pieces: list[Piece], start: int, stop: int) -> list[Piece]:
    """What of the pieces lies within [start, stop), as views."""
    cut = []
    for (first, last), k, v in pieces:
        begin, end = max(first, start), min(last, stop)
        if begin < end:
            rows = slice(begin - first, end - first)
            cut.append(((begin, end), k[rows], v[rows]))
    return cut
