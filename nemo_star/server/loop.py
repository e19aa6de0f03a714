"""The engine's side of the service: all ranks run this loop, and do in step what rank 0 was asked for.

Before each step rank 0 hands the orders that have come to all ranks, on gloo also where tensors travel by NCCL: while
nobody asks for anything, GPUs rest. What comes out of a step goes to the HTTP server's thread (`Outbox`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from nemo_star.config.serve import ServeConfig
from nemo_star.contexts.in_use import ContextsInUse
from nemo_star.contexts.store import ContextStore
from nemo_star.engine.encoding import Encoding
from nemo_star.engine.scheduler import Answer, Question
from nemo_star.llm.opened import OpenedModel
from nemo_star.parallel.groups import NO_LIMIT, broadcast_orders
from nemo_star.server.answer import StreamedAnswer, query_scores
from nemo_star.server.events import Answered, Encoded, Event, Failed, Progress
from nemo_star.server.mail import Inbox, Outbox
from nemo_star.server.metrics import EngineState, Metrics
from nemo_star.server.orders import Ask, Cancel, Encode, Forget, Order


class Desk(Protocol):
    """What the loop needs of the HTTP side."""

    inbox: Inbox
    outbox: Outbox
    metrics: Metrics


@dataclass(eq=False)
class _Job:
    order: Ask | Encode
    question: Question
    joins: bool
    """Whether another job that is under way asked for the same context before."""
    asked: float = field(default_factory=time.perf_counter)
    is_there: bool = False
    """Its context, and its listener knows."""
    steps_left: int | None = None
    """Of its context's encoding, as its listener knows."""


class EngineLoop:
    """Carries out orders until `Stop`.

    Args:
        store: of this replica's contexts.
        control: a gloo group of the replica's ranks.
        desk: the HTTP side, on the first rank; None on the others.
    """

    def __init__(
        self,
        config: ServeConfig,
        llm: OpenedModel,
        store: ContextStore,
        control: dist.ProcessGroup,
        desk: Desk | None = None,
    ) -> None:
        self._llm = llm
        self._store = store
        self._contexts = ContextsInUse(llm.engine, store)
        self._scheduler = llm.scheduler(
            max_batch_size=config.inference.max_batch_size,
            max_encodings=config.server.max_encodings,
            max_own_tokens=llm.max_own_tokens(store),
            steps_per_block=config.inference.steps_per_block,
            open_context=self._contexts.open,
        )
        self._control = control
        self._desk = desk
        self._jobs: dict[int, _Job] = {}
        self._is_stopped = False
        self._counted: WeakKeyDictionary[Encoding, list[int]] = WeakKeyDictionary()

    def run(self) -> None:
        """Orders and steps in turn; ends after `Stop`, with all contexts brought to disk where there is a folder."""
        while not self._is_stopped:
            for order in self._orders(wait=self._scheduler.is_idle):
                self._carry_out(order)
            if not self._scheduler.is_idle:
                self._end(self._scheduler.step())
            self._report()
        with self._llm.watchdog.suspended("keeping contexts"):
            self._store.close()

    def _orders(self, *, wait: bool) -> list[Order]:
        """What came in since the last step, on all ranks alike."""
        if not wait:
            return broadcast_orders(lambda: self._taken(wait=False), self._control)
        with self._llm.watchdog.suspended("waiting for requests"):
            return broadcast_orders(lambda: self._taken(wait=True), self._control)

    def _taken(self, *, wait: bool) -> list[Order]:
        assert self._desk is not None, "the first rank takes orders"
        return self._desk.inbox.take(wait=wait)

    def _carry_out(self, order: Order) -> None:
        if isinstance(order, Ask):
            self._add(order, self._answers(order), order.query_ids)
        elif isinstance(order, Encode):
            self._add(order, [], [])
        elif isinstance(order, Cancel):
            job = self._jobs.pop(order.job, None)
            if job is not None:
                self._scheduler.cancel(job.question)
                self._contexts.let_go(job.question.work)
        elif isinstance(order, Forget):
            self._store.forget_text(order.context_ids, owner=order.owner)
            self._scheduler.look_again()
        else:
            self._is_stopped = True

    def _add(self, order: Ask | Encode, answers: list[Answer | None], query_ids: list[int]) -> None:
        work = self._contexts.work(order.context_ids, owner=order.owner)
        question = Question(work, query_ids, answers=answers)
        if isinstance(order, Ask):
            question.max_tokens = order.params.max_tokens
            question.scores_query = order.scores_query
            question.on_scores = lambda logits: self._score(order, logits)
        joins = any(job.question.work is work for job in self._jobs.values())
        self._jobs[order.job] = _Job(order, question, joins)
        self._scheduler.add(question)

    def _score(self, order: Ask, logits: Tensor) -> None:
        try:
            self._tell(order.job, query_scores(logits, order.query_ids, order.params.logprobs or 0))
        except Exception as error:  # the request's own, as in `StreamedAnswer`
            self._tell(order.job, Failed(f"scoring the prompt failed: {type(error).__name__}: {error}"))

    def _answers(self, order: Ask) -> list[Answer | None]:
        params = order.params
        if self._desk is None:
            return [None] * params.n
        return [
            StreamedAnswer(self._llm, params, sample, lambda event: self._tell(order.job, event))
            for sample in range(params.n)
        ]

    def _end(self, done: list[Question]) -> None:
        """Let go of what is answered, or cannot be."""
        for question in done:
            number, job = next((number, job) for number, job in self._jobs.items() if job.question is question)
            del self._jobs[number]
            if question.work.error is not None:
                self._tell(number, Failed(question.work.error))
            else:
                kept, warning = self._kept(job) if isinstance(job.order, Encode) else (None, None)
                self._say_there(number, job, kept, warning)
                self._tell(number, Answered())
            self._contexts.let_go(question.work)

    def _kept(self, job: _Job) -> tuple[str | None, str | None]:
        """Where a named context is now, and why it is not on disk where it should be."""
        context = job.question.work.context
        assert context is not None
        if self._store.find(context.ids, owner=job.order.owner) is None:
            return None, None
        try:
            with self._llm.watchdog.suspended("keeping contexts"):
                return ("disk" if self._store.save(context) else "memory"), None
        except ValueError as error:
            return "memory", str(error)

    def _report(self) -> None:
        """On the first rank: what those who wait learn of this step, and the state of things."""
        if self._desk is None:
            return
        for number, job in self._jobs.items():
            work = job.question.work
            if work.encoding is not None and work.encoding.steps_left != job.steps_left:
                self._count_blocks(work.encoding)
                self._say_progress(number, job)
            if work.context is not None and isinstance(job.order, Ask):  # an Encode hears of it with its end
                self._say_there(number, job)
        self._desk.metrics.engine(
            EngineState(
                live=self._scheduler.live,
                encodings=len(self._scheduler.encodings),
                contexts=self._store.contexts,
                kv_bytes=self._store.used_bytes,
                kv_budget_bytes=self._store.budget_bytes,
                kv_tokens_by_rank=self._store.tokens_by_rank,
            )
        )
        self._desk.outbox.flush()

    def _count_blocks(self, encoding: Encoding) -> None:
        """Of all who wait for a context, the first one that looks counts; what was done for those who went away is
        counted already."""
        done = [done for done, _ in encoding.done_by_rank]
        before = self._counted.get(encoding, [0] * len(done))
        self._counted[encoding] = done
        if self._desk is not None:
            for rank, (now, earlier) in enumerate(zip(done, before, strict=True)):
                self._desk.metrics.blocks.labels(rank).inc(now - earlier)

    def _say_progress(self, number: int, job: _Job) -> None:
        work = job.question.work
        assert work.encoding is not None
        assert work.began is not None
        job.steps_left = left = work.encoding.steps_left
        done_by_rank = work.encoding.done_by_rank
        seconds, done = time.perf_counter() - work.began, max(done for done, _ in done_by_rank)
        self._tell(
            number,
            Progress(
                done_by_rank,
                tokens=len(work.ids),
                found_tokens=work.found_tokens,
                seconds=seconds,
                seconds_left=seconds / done * left if done else None,
            ),
        )

    def _say_there(self, number: int, job: _Job, kept: str | None = None, warning: str | None = None) -> None:
        work = job.question.work
        if job.is_there or self._desk is None:
            return
        job.is_there = True
        assert work.began is not None
        tokens = len(work.ids)
        was_there = work.encoding is None
        self._tell(
            number,
            Encoded(
                tokens=tokens,
                found_tokens=tokens if job.joins else work.found_tokens,
                queue_seconds=max(0.0, work.began - job.asked),
                prefill_seconds=0.0 if was_there else time.perf_counter() - max(work.began, job.asked),
                kept=kept,
                warning=warning,
            ),
        )

    def _tell(self, number: int, event: Event) -> None:
        if self._desk is not None:
            self._desk.outbox.add(number, event)


def control_group(replica: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of one replica's ranks, which must be all of the job's."""
    return dist.new_group(dist.get_process_group_ranks(replica), timeout=NO_LIMIT, backend="gloo")
