"""A context on its way to being encoded: step by step, so that other work can go on in between.

All ranks of a replica advance together. One step is a round, in which each rank encodes its next block; a rank that has
none takes part in what the others exchange.
"""

from __future__ import annotations

import time
from itertools import zip_longest
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nemo_star.attention.preceding import PrecedingKV
from nemo_star.attention.socket import attention_class
from nemo_star.attention.step import Handover, PrefillStep
from nemo_star.engine.context import EncodedContext
from nemo_star.methods.partition import Block, Partition, clipped
from nemo_star.runtime.marks import Mark, mark

if TYPE_CHECKING:
    from nemo_star.engine.engine import Engine

NO_BLOCK = Block(-1, ())
"""Of a rank that only accompanies others."""
TOKENS_AT_ONCE = 2048
"""That go on as in decode."""


class Encoding(Protocol):
    """What `Engine.begin` and `Engine.extend` give."""

    context: EncodedContext
    """Complete when `steps_left` is 0."""
    steps_left: int

    @property
    def done_by_rank(self) -> list[tuple[int, int]]:
        """(blocks encoded, blocks in all) of each cp rank, alike on all ranks."""
        ...

    def advance(self) -> bool:
        """Take a step, on all ranks of the replica; whether this rank encoded something of its own."""
        ...

    def abandon(self) -> None:
        """No more steps follow: wait for what is under way between ranks, and let go of it."""
        ...


class BlockEncoding:
    """Blocks of a context, round by round.

    Args:
        context: complete but for `blocks`.
        ids: [tokens] int32, of the whole context.
        blocks: to encode, by cp rank.
    """

    def __init__(self, engine: Engine, context: EncodedContext, ids: Tensor, blocks: Partition) -> None:
        self.context = context
        self.steps_left = blocks.rounds
        self._engine = engine
        self._ids = ids
        self._blocks = blocks
        # Made with the first step: all ranks put their exchanges under way at the same place in the order of things.
        self._handover: Handover | None = None
        self._preceding: PrecedingKV | None = None
        self._last: Mark | None = None
        tokens = [[context.method.tokens_in_flight(block) for block in of_rank] for of_rank in blocks.ranks]
        self._in_flight = list(zip_longest(*tokens, fillvalue=0))

    @torch.inference_mode()
    def advance(self) -> bool:
        """Encode a block on each rank that has one left."""
        started = time.perf_counter()
        engine, number = self._engine, self._blocks.rounds - self.steps_left
        if number == 0:
            self._open()
        mine = self._blocks.ranks[engine.groups.cp.rank()]
        block = mine[number] if number < len(mine) else NO_BLOCK
        engine.encode_block(
            PrefillStep(
                block,
                self._blocks,
                self.context.cache,
                self._handover,
                self._in_flight[number],
                number,
                self._preceding,
            ),
            self.context.method,
            self._ids,
        )
        self.steps_left -= 1
        self._wait_for_the_one_before()
        if not self.steps_left:
            self._close()
        self.context.seconds += time.perf_counter() - started
        return block is not NO_BLOCK

    def _wait_for_the_one_before(self) -> None:
        """A GPU has this block in its queue and nothing more: progress is told at most a block ahead of it."""
        before, self._last = self._last, mark(self._engine.device)
        if before is not None:
            before.synchronize()

    @property
    def done_by_rank(self) -> list[tuple[int, int]]:
        """As of `Encoding`."""
        done = self._blocks.rounds - self.steps_left
        return [(min(done, len(blocks)), len(blocks)) for blocks in self._blocks.ranks]

    def abandon(self) -> None:
        """Between two rounds nothing is under way but what an earlier one sent."""
        if self._handover is not None:
            self._handover.finish()
        self._engine.stage.finish_sending()
        self.steps_left, self._handover, self._preceding = 0, None, None

    def _open(self) -> None:
        engine, context, stage = self._engine, self.context, self._engine.stage
        attending = stage.model.config.num_layers - (not engine.state.completes_prefill)
        self._handover = attention_class(context.method).handover(
            context.method,
            self._blocks,
            engine.groups.cp,
            shape=stage.kv_shape,
            layer_numbers=[number for number in stage.full_layer_numbers if number <= attending],
            cache=context.cache,
        )
        if stage.window is None:
            return
        first, tokens = context.tokens, self._blocks.context_tokens
        reach = stage.window - 1 + context.method.overlap_size
        spans = (context.partition.spans_of(rank) for rank in range(engine.groups.cp.size()))
        self._preceding = PrecedingKV(
            engine.groups.cp,
            self._blocks,
            window=stage.window,
            cached_from=context.method.windowed_from(tokens, stage.window),
            held=[clipped(of_rank, max(0, first - reach), first) for of_rank in spans],
            cache=context.cache,
        )

    def _close(self) -> None:
        engine, context = self._engine, self.context
        if self._handover is not None:
            self._handover.finish()
            context.waited_seconds += self._handover.waited_seconds
        context.goes_on(self._ids, self._blocks)
        if self._preceding is not None:
            context.waited_seconds += self._preceding.waited_seconds
            spans = context.partition.spans_of(engine.groups.cp.rank())
            near = clipped(spans, self._preceding.cached_from, context.tokens)
            context.cache.keep_last(engine.stage.windowed_layer_numbers, sum(stop - start for start, stop in near))
        engine.stage.finish_sending()
        engine.synchronize()


class GoingOn:
    """Further tokens of a context whose method is exact: they see everything before them, as queries do, and their K/V
    become the context's."""

    def __init__(self, engine: Engine, context: EncodedContext, ids: Tensor) -> None:
        self.context = context
        self.steps_left = self._steps = -(-(len(ids) - context.tokens) // TOKENS_AT_ONCE)
        self._engine = engine
        self._ids = ids

    def advance(self) -> bool:
        """Run the next tokens on all ranks."""
        started = time.perf_counter()
        engine, context = self._engine, self.context
        first = context.tokens
        last = min(first + TOKENS_AT_ONCE, len(self._ids))
        sequence = engine.sequence(context, max_tokens=last - first)
        engine.decode([(sequence, self._ids[first:last].tolist())])
        (owner, span), rank = sequence.runs[0], engine.groups.cp.rank()
        if owner == rank:
            context.cache.extend(sequence.cache)
        ranks = tuple((Block(-1, (span,)),) if cp_rank == owner else () for cp_rank in range(engine.groups.cp.size()))
        context.goes_on(self._ids[:last], Partition(last, ranks))
        self.steps_left -= 1
        engine.synchronize()
        context.seconds += time.perf_counter() - started
        return owner == rank

    @property
    def done_by_rank(self) -> list[tuple[int, int]]:
        """All ranks attend to every token, each to its share of the keys."""
        return [(self._steps - self.steps_left, self._steps)] * self._engine.groups.cp.size()

    def abandon(self) -> None:
        """Nothing is under way between two steps."""
        self.steps_left = 0
