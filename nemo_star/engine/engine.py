"""Contexts and sequences through the model: encode a context, decode sequences on it. Knows token ids, not text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ids
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_star.attention.cache import KVCache
from nemo_star.attention.socket import attention_class
from nemo_star.attention.step import AttentionState, ContextRows, DecodeStep, Near, PrefillStep, SequenceRows
from nemo_star.engine.context import EncodedContext, Sequence, block_spans_backwards, positions_from
from nemo_star.engine.encoding import BlockEncoding, Encoding, GoingOn
from nemo_star.engine.graphs import StepGraphs
from nemo_star.kernels.settle import names
from nemo_star.kernels.stored import told
from nemo_star.methods.method import Method
from nemo_star.methods.partition import Partition
from nemo_star.models.stage import Stage
from nemo_star.parallel.groups import Groups, gather_objects

MAX_RESERVED_TOKENS = 4096
"""Allocated for query and answer from the start; an answer seldom takes all the tokens that it may."""

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
        self.graphs: StepGraphs | None = None
        """Where decode steps that come again are recorded."""

    def describe(self) -> str:
        """How it computes, for a person."""
        decode = "replicated" if self.state.decode_group is None else "sharded"
        over = f", decode {decode}" if self.groups.cp.size() > 1 else ""
        kernels, stored = names(self.state.kernel, self.state.decode_kernel), self.state.cache_dtype
        kv = "" if stored == self.dtype else f", K/V in {told(self.state.decode_kernel, stored)}"
        graphs = "" if self.graphs is None else ", decode steps recorded"
        return f"kernel {kernels}, {str(self.dtype).removeprefix('torch.')}{kv}{over}{graphs}"

    def begin(self, context_ids: Ids[int] | Tensor) -> Encoding:
        """Phase 1, step by step: the K/V of a context. Ranks exchange nothing but what their attention needs.

        Args:
            context_ids: the whole context, on every rank.
        """
        ids = torch.as_tensor(context_ids, dtype=torch.int32)
        blocks = self.method.partition(len(ids), self.groups.cp.size())
        cache = KVCache(self.state.cache_dtype, capacity=blocks.tokens_of(self.groups.cp.rank()))
        cache.reserve(self.stage.full_layer_numbers, self.stage.kv_shape)
        nothing = Partition(0, tuple(() for _ in blocks.ranks))
        return BlockEncoding(self, EncodedContext(ids[:0], cache, nothing, self.method.pinned(len(ids))), ids, blocks)

    def extend(self, context: EncodedContext, context_ids: Ids[int] | Tensor) -> Encoding:
        """A context goes on, step by step: in the end its K/V are those of the longer text encoded at its block size.

        Sequences that hang on it end with that.

        Args:
            context_ids: what is added.

        Raises:
            ValueError: the context comes from disk, of a method with blocks that this engine's layers do not have.
        """
        method = context.method
        if not method.exact and attention_class(method) is not attention_class(self.method):
            raise ValueError(
                f"a context of attention={method.kind} cannot go on in an engine of attention={self.method.kind}: "
                f"start one with attention={method.kind}, or encode the longer text here"
            )
        ids = torch.cat((context.ids, torch.as_tensor(context_ids, dtype=torch.int32)))
        first = context.method.goes_on_from(context.tokens)
        if first < context.tokens:
            context.cut(first, self.groups.cp.rank())
        blocks = context.method.going_on(context.partition, len(ids))
        return GoingOn(self, context, ids) if blocks is None else BlockEncoding(self, context, ids, blocks)

    def encode(self, context_ids: Ids[int] | Tensor, *, on_block: Callable[[], None] = lambda: None) -> EncodedContext:
        """A context, all at once; `on_block` is called after each of this rank's blocks."""
        return finished(self.begin(context_ids), on_block)

    def encode_block(self, step: PrefillStep, method: Method, context_ids: Tensor) -> None:
        """Run a block through the stage; without a block, take part in what other ranks exchange."""
        if not method.in_flight(step.block):
            with self._step(step, context_ids[:0]):
                self.stage.accompany(step)
            return
        inputs = attention_class(method).inputs(method, step.block, context_ids, self.stage.vocab_size)
        ids, positions = (tensor.to(self.device) for tensor in inputs)
        with self._step(step, positions):
            self.stage.encode(ids, positions, torch.tensor([len(context_ids)], device=self.device))

    def empty_context(self) -> EncodedContext:
        """No context at all: sequences that hang on it see themselves only, all of what they say."""
        nothing = Partition(0, ((),) * self.groups.cp.size())
        return EncodedContext(torch.empty(0, dtype=torch.int32), KVCache(self.state.cache_dtype), nothing, self.method)

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

    def truncate(self, sequence: Sequence, tokens: int) -> None:
        """Roll a sequence back to its first `tokens` own tokens."""
        sequence.truncate(tokens, self.groups.cp.rank())

    @torch.inference_mode()
    def decode(self, batch: Iterable[tuple[Sequence, Ids[int]]], *, scored: Ids[int] = ()) -> Tensor | None:
        """Phase 2, one step: run the next tokens of each sequence, which see its context and what came before them.

        Args:
            scored: places in the batch of sequences whose logits after every token are wanted.

        Returns:
            logits [rows, vocab] float32 after the last token of each, or after all tokens of a scored one, in the
            order of the batch; on the replica's first rank.
        """
        rows = [_Row(place, sequence, list(tokens)) for place, (sequence, tokens) in enumerate(batch)]
        if self.graphs is not None:
            next_tokens = [(row.sequence, row.tokens) for row in rows]
            if self.state.observer is None and not scored and self.graphs.takes(next_tokens):
                after = self.graphs.step(next_tokens)
                return after if self.groups.replica.rank() == 0 else None
            self.graphs.forget(row.sequence for row in rows)
        together: dict[int, list[_Row]] = {}
        for row in rows:
            together.setdefault(id(row.sequence.context), []).append(row)
        ids: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []
        wanted: list[list[int]] = [[]] * len(rows)
        contexts = []
        for of_context in together.values():
            start, sequences = len(ids), []
            for row in of_context:
                sequences.append(self._sequence_rows(row.sequence, len(ids), len(row.tokens)))
                position = sequences[-1].position
                positions += range(position, position + len(row.tokens))
                ids += row.tokens
                lengths += [row.sequence.context.tokens] * len(row.tokens)
                first = len(ids) - (len(row.tokens) if row.place in scored else 1)
                wanted[row.place] = list(range(first, len(ids)))
            contexts.append(ContextRows(start, len(ids), of_context[0].sequence.context.cache, tuple(sequences)))
        # One copy to the device: each waits for the host, and a small kernel takes as long to start as a large one.
        inputs = torch.tensor([ids, positions, lengths], device=self.device)
        last = [row for of_sequence in wanted for row in of_sequence]
        logits = self.forward(DecodeStep(tuple(contexts)), inputs, last)
        if self.groups.tp.rank() == 0 and self.groups.cp.rank() == 0 and (self.stage.is_first or self.stage.is_last):
            logits = self.stage.logits_to_first(logits, len(last))
        return logits if self.groups.replica.rank() == 0 else None

    def forward(self, step: DecodeStep, inputs: Tensor, wanted: list[int]) -> Tensor | None:
        """One pass of the stage in decode: logits [len(wanted), vocab] float32 after these rows; on the last stage.

        Args:
            inputs: [3, s] int64: ids, positions, lengths of the contexts that they hang on.
        """
        input_ids, position_ids, context_tokens = inputs
        with self._step(step, position_ids):
            return self.stage.decode(input_ids, position_ids, context_tokens, wanted)

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
            chosen = None if logits is None or choose is None else [choose(logits[0])]
            ((token, ended),) = self.agree(chosen, 1)
            yield Step(token, None if logits is None else logits[0])
            if ended:
                return
            tokens = [token]

    def agree(self, chosen: Ids[tuple[int, bool]] | None, count: int) -> list[tuple[int, bool]]:
        """The first rank's choices (token, ended), on every rank: machines may round differently, and all must stop
        together.

        Args:
            chosen: on the replica's first rank; the others may give None.
        """
        if chosen is not None and self.groups.replica.size() == 1:
            return list(chosen)
        choices = torch.zeros(count, 2, dtype=torch.int64, device=self.device)
        if chosen is not None:
            choices.copy_(torch.tensor([[token, int(ended)] for token, ended in chosen]))
        dist.broadcast(choices, group=self.groups.replica, group_src=0)
        return [(token, bool(ended)) for token, ended in choices.tolist()]

    def _sequence_rows(self, sequence: Sequence, start: int, tokens: int) -> SequenceRows:
        """The next tokens of a sequence, in rows from `start` on; their K/V go to the rank that holds least."""
        position, rank = sequence.position, self.groups.cp.rank()
        caches_own = self.deal(sequence, tokens) == rank
        near = None
        if self.stage.window is not None:
            first = position - self.stage.window + 1
            of_context = block_spans_backwards(sequence.context.partition.ranks[rank])
            held = (of_context, sequence.own_spans_backwards(rank))
            # A single token sees all of them: attention then asks for their number only, and nothing is copied.
            device = self.device if tokens > 1 else None
            near = Near(*(positions_from(spans, first).to(device) for spans in held))
        return SequenceRows(start, start + tokens, sequence.cache, caches_own, position, near)

    def deal(self, sequence: Sequence, tokens: int) -> int:
        """The cp rank that the next tokens of a sequence go to."""
        if sequence.revision != sequence.context.revision:
            raise ValueError("the context has gone on since this sequence began: begin another one on it")
        return sequence.deal(tokens)

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

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def finished(encoding: Encoding, on_block: Callable[[], None] = lambda: None) -> EncodedContext:
    """All steps of an encoding; `on_block` is called after those in which this rank encoded something."""
    while encoding.steps_left:
        if encoding.advance():
            on_block()
    return encoding.context


@dataclass(frozen=True)
class _Row:
    """A sequence's place in a batch, and its next tokens."""

    place: int
    sequence: Sequence
    tokens: list[int]
