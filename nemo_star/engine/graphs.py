"""Decode steps that are recorded once and replayed: on a GPU a CUDA graph, which the host starts by one call.

A step of one token of each sequence starts some thirty kernels a layer, each of which the device has done before the
host has started the next. Recorded, the same sequences take their next tokens by one copy of a few numbers and one
call. A recorded step is of these sequences on these contexts, whose K/V do not move; other sequences, or more own
tokens than it looks at, are recorded anew.

All decisions follow from what all ranks of a replica know alike: NCCL's collectives are recorded by all ranks of a
group in the same step, or by none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nemo_star.attention.fixed import FixedStep, OwnKV
from nemo_star.attention.step import ContextRows
from nemo_star.config.model import ModelConfig
from nemo_star.engine.context import Sequence
from nemo_star.models.experts import GROUPED_MULTIPLE, runs_grouped_on
from nemo_star.parallel.experts import ExpertLayout
from nemo_star.parallel.layout import Layout

if TYPE_CHECKING:
    from nemo_star.engine.engine import Engine

MAX_GRAPHS = 4
"""Recorded steps that are kept, those that were used last: each holds what its own tokens' K/V lie in."""
MIN_ROOM = 256
"""Own tokens that a sequence has room for beyond those it has, where nobody said how many there will be."""
MIN_REACH = 256
"""Own tokens that a recorded step looks at, at least; then twice as many, each time they do not do."""

NextTokens = Ids[tuple[Sequence, list[int]]]


class StepGraph(Protocol):
    """Work of the device that is recorded once and replayed: the same operations, on tensors at the same addresses."""

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        """Record what `run` gives to the device; where its result lies after each replay."""
        ...

    def replay(self) -> None: ...


class CudaStepGraph:
    """`torch.cuda.CUDAGraph`. What is allocated on the way comes out of a pool of memory that all graphs of an engine
    share, which never run at the same time and whose results are read before the next one runs.

    Args:
        recorded: those that are there. A pool is gone with the last graph that has it, and its handle cannot be used
            again (c10/cuda/CUDACachingAllocator.cpp, `create_or_incref_pool`): so it is taken from one that lives.
    """

    def __init__(self, recorded: weakref.WeakSet[CudaStepGraph]) -> None:
        self._recorded = recorded
        self._graph = torch.cuda.CUDAGraph()

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        living = next(iter(self._recorded), None)  # kept until this one has the pool, too
        pool = None if living is None else living._graph.pool()
        # The threads of NCCL's and of our own watchdog ask for events meanwhile: only this thread's calls count.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
        self._recorded.add(self)
        return result

    def replay(self) -> None:
        self._graph.replay()


def cuda_step_graphs() -> Callable[[], StepGraph]:
    """What makes the graphs of one engine."""
    recorded: weakref.WeakSet[CudaStepGraph] = weakref.WeakSet()
    return lambda: CudaStepGraph(recorded)


def _odd_width(model: ModelConfig, layout: Layout) -> str | None:
    """What of a mixture grouped products do not take on a rank; in decode cp ranks may take parts of an expert."""
    assert model.moe is not None
    place = ExpertLayout(layout)
    parts = place.expert_tp * (1 if place.over_cp else layout.cp)
    if model.hidden_size % GROUPED_MULTIPLE:
        return f"hidden_size={model.hidden_size}"
    ffn = model.moe.ffn_hidden_size
    return f"moe.ffn_hidden_size={ffn}" if ffn % (GROUPED_MULTIPLE * parts) else None


def check_graphs(model: ModelConfig, layout: Layout, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse `decode.cuda_graph=true` where a step cannot be recorded.

    Args:
        dtype: of the model.

    Raises:
        ValueError: names what stands against it.
    """
    problem = None
    if device.type != "cuda":
        problem = f"it needs GPUs, and this is {device.type}"
    elif layout.pp > 1:
        problem = (
            f"parallel.pipeline_model_parallel_size={layout.pp}: stages wait for each other on the host; set it to 1"
        )
    elif model.moe is not None and not runs_grouped_on(device, dtype):
        problem = (
            "the host asks which experts a token takes, but where torch has grouped products (release 2.10, bfloat16, "
            "compute capability 9 or 10)"
        )
    elif model.moe is not None and (odd := _odd_width(model, layout)):
        problem = f"{odd} leaves a rank no multiple of {GROUPED_MULTIPLE}, which torch's grouped products want"
    elif model.needs_windows:
        problem = "what a windowed layer sees moves with each token"
    if problem is not None:
        raise ValueError(f"decode.cuda_graph=true does not go here: {problem}")


@dataclass(eq=False)
class _Recorded:
    """A step of some sequences, before or after it was recorded."""

    sequences: list[weakref.ref[Sequence]]
    """In the order of the rows. They, and not this, keep their K/V and their contexts."""
    own: OwnKV
    reach: int
    inputs: Tensor
    """[5, rows] int64 on the device: ids, positions, tokens of the context, slots, lengths."""
    has_run: bool = False
    graph: StepGraph | None = None
    logits: Tensor | None = None
    """[rows, vocab] float32, what the graph leaves."""

    def is_of(self, sequences: Ids[Sequence]) -> bool:
        return len(self.sequences) == len(sequences) and all(
            known() is sequence for known, sequence in zip(self.sequences, sequences, strict=True)
        )


class StepGraphs:
    """Runs decode steps of an engine, recorded where the same sequences come again.

    Args:
        make: a graph that nothing is recorded in yet.

    Raises:
        ValueError: a kernel that does more than give torch's operations to the device.
    """

    def __init__(self, engine: Engine, make: Callable[[], StepGraph]) -> None:
        name = engine.state.decode_kernel.name
        if name in ("te", "numba"):
            raise ValueError(
                f"decode.cuda_graph=true cannot record the decode of attention.kernel={name}: flash, math or cpu can be"
            )
        self._engine = engine
        self._make = make
        self._recorded: list[_Recorded] = []  # that which was used last at the end
        self.on_step: Callable[[], None] = lambda: None
        """Called after each step: no layer is, where it is replayed."""

    @staticmethod
    def takes(batch: NextTokens) -> bool:
        """Whether a step has the shape that is recorded: one token of each sequence, none of them twice."""
        return all(len(tokens) == 1 for _, tokens in batch) and len({id(sequence) for sequence, _ in batch}) == len(
            batch
        )

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """These go on by other steps, which may move their K/V."""
        gone = {id(sequence) for sequence in sequences}
        self._recorded = [known for known in self._recorded if not any(id(ref()) in gone for ref in known.sequences)]

    def step(self, batch: NextTokens) -> Tensor:
        """Run the next token of each sequence: logits [rows, vocab] float32 in the order of the batch.

        Raises:
            ValueError: a context that has gone on since a sequence began.
        """
        contexts = [id(sequence.context) for sequence, _ in batch]
        order = sorted(range(len(batch)), key=lambda place: contexts.index(contexts[place]))  # each context's together
        sequences = [batch[place][0] for place in order]
        rank = self._engine.groups.cp.rank()
        positions = [sequence.position for sequence in sequences]
        owners = [self._engine.deal(sequence, 1) for sequence in sequences]
        known = self._of(sequences)
        lengths = [sequence.own_tokens_by_rank[rank] for sequence in sequences]
        known.inputs.copy_(
            torch.tensor(
                [
                    [batch[place][1][0] for place in order],
                    positions,
                    [sequence.context.tokens for sequence in sequences],
                    [
                        known.own.slot(row, length - 1 if owner == rank else None)
                        for row, (owner, length) in enumerate(zip(owners, lengths, strict=True))
                    ],
                    lengths,
                ]
            )
        )
        logits = self._run(known, sequences)
        for sequence, owner in zip(sequences, owners, strict=True):
            if owner == rank:
                sequence.cache.count(1)
        self.on_step()
        if order == list(range(len(order))):
            return logits.clone()  # the next step writes there
        back = sorted(range(len(order)), key=lambda row: order[row])
        return logits[back]

    def _run(self, known: _Recorded, sequences: Ids[Sequence]) -> Tensor:
        """The first time as it is, which also loads what the device needs for it; the second time it is recorded: what
        comes once only is not worth it."""
        if known.graph is None:
            if not known.has_run:
                known.has_run = True
                return self._forward(known, sequences)
            graph = self._make()
            known.logits = graph.record(lambda: self._forward(known, sequences))
            known.graph = graph
        known.graph.replay()
        assert known.logits is not None
        return known.logits

    def _forward(self, known: _Recorded, sequences: Ids[Sequence]) -> Tensor:
        """Logits [rows, vocab] of all rows; nothing in it asks the device for a number."""
        starts = [
            row
            for row, sequence in enumerate(sequences)
            if row == 0 or sequence.context is not sequences[row - 1].context
        ]
        contexts = tuple(
            ContextRows(start, stop, sequences[start].context.cache, ())
            for start, stop in zip(starts, [*starts[1:], len(sequences)], strict=True)
        )
        slots, lengths = known.inputs[3], known.inputs[4]
        step = FixedStep(contexts, known.own, slots, lengths, known.reach)
        logits = self._engine.forward(step, known.inputs[:3], list(range(len(sequences))))
        assert logits is not None, "there is one stage"
        return logits

    def _of(self, sequences: Ids[Sequence]) -> _Recorded:
        """The step of these sequences, whose next tokens are dealt out already."""
        most = max(max(sequence.own_tokens_by_rank) for sequence in sequences)
        known = next((known for known in self._recorded if known.is_of(sequences)), None)
        if known is not None and most <= known.reach:
            self._recorded.remove(known)
        elif known is not None and most <= known.own.capacity:
            self._recorded.remove(known)
            known = replace(known, reach=_reach(most, known.own.capacity), has_run=False, graph=None, logits=None)
        else:
            self.forget(sequences)
            known = self._prepared(sequences, most)
        self._recorded = [*self._recorded, known][-MAX_GRAPHS:]
        return known

    def _prepared(self, sequences: Ids[Sequence], most: int) -> _Recorded:
        """The sequences' own K/V are moved beside each other."""
        stage = self._engine.stage
        capacity = max(most + MIN_ROOM, *(sequence.cache.capacity for sequence in sequences))
        shape = replace(stage.kv_shape, dtype=self._engine.state.cache_dtype)
        own = OwnKV.empty(len(sequences), capacity, stage.layer_numbers, shape)
        for row, sequence in enumerate(sequences):
            sequence.cache.move(own.of(row))
        inputs = torch.zeros(5, len(sequences), dtype=torch.int64, device=self._engine.device)
        refs = [weakref.ref(sequence, self._is_gone) for sequence in sequences]
        return _Recorded(refs, own, _reach(most, capacity), inputs)

    def _is_gone(self, gone: weakref.ref[Sequence]) -> None:
        """What a step looks at is freed with its sequences. It keeps its place among those kept, because ranks may let
        go of a sequence at different times."""
        for known in self._recorded:
            if any(ref is gone for ref in known.sequences):
                known.own, known.graph, known.logits = OwnKV(0, {}), None, None


def _reach(tokens: int, capacity: int) -> int:
    """Slots to look at for so many own tokens: a power of two above them, so that there are few recordings."""
    return min(max(MIN_REACH, 1 << tokens.bit_length()), capacity)
