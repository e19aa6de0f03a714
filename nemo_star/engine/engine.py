"""Contexts and sequences through the model: encode a context, decode sequences on it. Knows token ids, not text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ids
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_star.attention.cache import KVCache
from nemo_star.attention.preceding import PrecedingKV
from nemo_star.attention.socket import attention_class
from nemo_star.attention.step import AttentionState, DecodeStep, Handover, Near, PrefillStep, SequenceRows
from nemo_star.engine.context import EncodedContext, Sequence, positions_from
from nemo_star.methods.partition import Block, Partition
from nemo_star.models.stage import Stage
from nemo_star.parallel.groups import Groups, gather_objects

MAX_RESERVED_TOKENS = 4096
"""Allocated for query and answer from the start; an answer seldom takes all the tokens that it may."""

NO_BLOCK = Block(-1, ())
"""Of a rank that only accompanies others."""

Choose = Callable[[Tensor], tuple[int, bool]]
"""Logits [vocab] float32 -> (token, whether it ends the answer). Asked on the replica's first rank only."""


@dataclass(frozen=True)
class PrefillReport:
    """What encoding a context took."""

    seconds: float
    """Wall time of the slowest rank."""
    kv_tokens_per_cp_rank: list[int]


@dataclass(frozen=True)
class Step:
    """One generated token; on the replica's first rank, the logits [vocab] float32 it was chosen from."""

    token: int
    logits: Tensor | None


class Engine:
    """Encodes contexts and decodes sequences; all ranks of a replica call the same methods with the same tokens.

    Args:
        stage: this rank's part of the model.
        state: what the model's attention layers were built with.
    """

    def __init__(self, stage: Stage, state: AttentionState, groups: Groups) -> None:
        self.stage = stage
        self.state = state
        self.groups = groups
        self.method = state.method
        self.device, self.dtype = stage.device, stage.dtype

    def describe(self) -> str:
        """How it computes, for a person."""
        decode = "replicated" if self.state.decode_group is None else "sharded"
        over = f", decode {decode}" if self.groups.cp.size() > 1 else ""
        return f"kernel {self.state.kernel.name}, {str(self.dtype).removeprefix('torch.')}{over}"

    @torch.inference_mode()
    def encode(self, context_ids: Ids[int], *, on_block: Callable[[], None] = lambda: None) -> EncodedContext:
        """Phase 1: the K/V of a context. Ranks exchange nothing but what their attention needs.

        Args:
            context_ids: the whole context, on every rank.
            on_block: called after each of this rank's blocks.
        """
        started = time.perf_counter()
        partition = self.method.partition(len(context_ids), self.groups.cp.size())
        cp_rank = self.groups.cp.rank()
        cache = KVCache(self.state.cache_dtype, capacity=partition.tokens_of(cp_rank))
        cache.reserve(self.stage.full_layer_numbers, self.stage.kv_shape)
        window = self.stage.window
        preceding = None if window is None else PrecedingKV(self.groups.cp, partition, window=window)
        handover = attention_class(self.method).handover(
            self.method,
            partition,
            self.groups.cp,
            shape=self.stage.kv_shape,
            layer_numbers=self.stage.full_layer_numbers,
        )
        ids = torch.tensor(context_ids, device=self.device)
        blocks = partition.ranks[cp_rank]
        in_flight = self._in_flight(partition)
        for number in range(partition.rounds if self.stage.in_step else len(blocks)):
            block = blocks[number] if number < len(blocks) else NO_BLOCK
            step = PrefillStep(block, partition, cache, handover, in_flight[number], number, preceding)
            if block is NO_BLOCK:
                with self._step(step, ids[:0]):
                    self.stage.accompany(step)
            else:
                self._encode_block(ids, step)
                on_block()
        waited = _finished(handover) + (preceding.waited_seconds if preceding else 0.0)
        self.synchronize()
        return EncodedContext(cache, partition, self.method, time.perf_counter() - started, waited)

    def prefill_report(self, context: EncodedContext) -> PrefillReport:
        """What encoding took on all ranks of the replica, which all ask; K/V as counted in their caches."""
        mine = self.groups.cp.rank(), context.cache.tokens, context.seconds
        reports = gather_objects(mine, self.groups.replica)
        held = {rank: tokens for rank, tokens, _ in reports}
        return PrefillReport(max(seconds for *_, seconds in reports), [held[rank] for rank in range(len(held))])

    def sequence(self, context: EncodedContext, *, max_tokens: int = 0) -> Sequence:
        """A new sequence on a context, without tokens; `max_tokens` it may come to, for what is allocated first."""
        cache = KVCache(self.state.cache_dtype, capacity=min(max_tokens, MAX_RESERVED_TOKENS))
        return Sequence(context, cache, [0] * self.groups.cp.size())

    @torch.inference_mode()
    def decode(self, batch: Iterable[tuple[Sequence, Ids[int]]]) -> Tensor | None:
        """Phase 2, one step: run the next tokens of each sequence, which see its context and what came before them.

        Returns:
            logits [sequences, vocab] float32 after the last token of each, on the replica's first rank.
        """
        ids: list[int] = []
        positions: list[Tensor] = []
        contexts: list[int] = []
        rows = []
        for sequence, tokens in batch:
            start, position = len(ids), sequence.position
            positions.append(torch.arange(position, position + len(tokens), device=self.device))
            caches_own = sequence.deal(len(tokens)) == self.groups.cp.rank()
            if caches_own:
                sequence.cached(position, position + len(tokens))
            ids += tokens
            contexts += [sequence.context.tokens] * len(tokens)
            rows.append(
                SequenceRows(
                    start,
                    len(ids),
                    sequence.context.cache,
                    sequence.cache,
                    caches_own=caches_own,
                    position=position,
                    near=self._near(sequence, position),
                )
            )
        last = [row.stop - 1 for row in rows]
        position_ids = torch.cat(positions)
        input_ids, context_tokens = (torch.tensor(values, device=self.device) for values in (ids, contexts))
        with self._step(DecodeStep(tuple(rows)), position_ids):
            logits = self.stage.decode(input_ids, position_ids, context_tokens, last)
        if self.groups.tp.rank() == 0 and self.groups.cp.rank() == 0 and (self.stage.is_first or self.stage.is_last):
            logits = self.stage.logits_to_first(logits, len(last))
        return logits if self.groups.replica.rank() == 0 else None

    def generate(
        self, context: EncodedContext, query_ids: Ids[int], *, max_tokens: int, choose: Choose | None
    ) -> Iterator[Step]:
        """One question: encode the query, then decode token by token, until `choose` ends it or the number is reached.

        `choose` is asked on the replica's first rank; the others may give None.
        """
        sequence = self.sequence(context, max_tokens=len(query_ids) + max_tokens)
        tokens = list(query_ids)
        for _ in range(max_tokens):
            logits = self.decode([(sequence, tokens)])
            token, ended = self._agree(None if logits is None else logits[0], choose)
            yield Step(token, None if logits is None else logits[0])
            if ended:
                return
            tokens = [token]

    def _near(self, sequence: Sequence, position: int) -> Near | None:
        """What windowed layers see from `position` on."""
        if self.stage.window is None:
            return None
        first = position - self.stage.window + 1
        spans = sequence.context.partition.spans_of(self.groups.cp.rank())
        return Near(
            *(torch.tensor(positions_from(held, first), device=self.device) for held in (spans, sequence.own_spans))
        )

    def _in_flight(self, partition: Partition) -> list[tuple[int, ...]]:
        """Tokens in flight on each cp rank, for its first block, its second, and so on until no rank has any."""
        tokens = [[self.method.tokens_in_flight(block) for block in blocks] for blocks in partition.ranks]
        return list(zip_longest(*tokens, fillvalue=0))

    def _encode_block(self, context_ids: Tensor, step: PrefillStep) -> None:
        spans = self.method.in_flight(step.block)
        positions = torch.cat([torch.arange(start, stop, device=self.device) for start, stop in spans])
        with self._step(step, positions):
            self.stage.encode(context_ids[positions], positions, torch.tensor([len(context_ids)], device=self.device))

    @contextmanager
    def _step(self, step: PrefillStep | DecodeStep, positions: Tensor) -> Iterator[None]:
        """What the layers read in one forward pass; nothing of it is kept alive after."""
        state = self.state
        state.step = step
        state.query_scale, state.windowed_query_scale = self.stage.query_scales(positions)
        try:
            yield
        finally:
            state.step = state.query_scale = state.windowed_query_scale = None

    def _agree(self, logits: Tensor | None, choose: Choose | None) -> tuple[int, bool]:
        """The first rank's choice, on every rank: machines may round differently, and all must stop together."""
        choice = torch.zeros(2, dtype=torch.int64, device=self.device)
        if logits is not None:
            assert choose is not None
            token, ended = choose(logits)
            choice[0], choice[1] = token, int(ended)
        if self.groups.replica.size() > 1:
            dist.broadcast(choice, group=self.groups.replica, group_src=0)
        token, ended = choice.tolist()
        return token, bool(ended)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _finished(handover: Handover | None) -> float:
    """Seconds that a prefill waited for its handover, which ends."""
    if handover is None:
        return 0.0
    handover.finish()
    return handover.waited_seconds
