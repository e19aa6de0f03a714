"""The loop: contexts that wait to be encoded, sequences that are under way, and what comes next.

`step()` is schedule, run, postprocess. All ranks of a replica run it with the same questions and come to the same
decisions; only the choice of tokens is the first rank's. Between two blocks of a context that is being encoded, the
live sequences get their tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from nemo_star.engine.context import EncodedContext, Sequence
from nemo_star.engine.encoding import Encoding
from nemo_star.engine.engine import Engine, PrefillReport


class Answer(Protocol):
    """What becomes of one sample's tokens, on the rank that chooses."""

    def choose(self, logits: Tensor) -> tuple[int, bool]:
        """Logits [vocab] float32 -> (token, whether it ends the answer)."""
        ...


@dataclass(eq=False)
class ContextWork:
    """A context that questions hang on: encoded, or to be encoded when its turn comes."""

    ids: Ids[int] | Tensor = ()
    context: EncodedContext | None = None
    on_block: Callable[[], None] = lambda: None
    """Called after each block that this rank has encoded."""
    on_encoded: Callable[[EncodedContext], None] = lambda context: None
    """Called when it is there, encoded or found."""
    report: PrefillReport | None = None
    """What encoding took, once it is done here."""
    began: float | None = None
    """When encoding began (`time.perf_counter`)."""


@dataclass(eq=False)
class Question:
    """One query on a context, and its answers."""

    work: ContextWork
    query_ids: list[int]
    max_tokens: int
    answers: Ids[Answer | None]
    """One for each sample; None on ranks that do not choose."""
    sequence: Sequence | None = None
    """To go on with; None: a new one. Each answer's sequence is found in `sequences`, less the last token."""
    sequences: list[Sequence] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    """Generated ones of each answer."""
    left: int = 0
    """Answers under way."""


@dataclass(eq=False)
class _Live:
    """An answer under way."""

    question: Question
    sequence: Sequence
    run: list[int]
    """Tokens to run next."""
    sample: int | None = None
    """Of the question; None: the query is to be run, after which its samples part."""


class Scheduler:
    """Answers questions on the ranks of a replica.

    Args:
        max_batch_size: answers under way at the same time.
        steps_per_block: tokens that live answers get between two blocks of a context being encoded.
        open_context: an encoding for a context whose turn it is, or the context itself where it is known already; None
            while there is no room for it beside those in use. By default every context is encoded.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch_size: int,
        steps_per_block: int = 1,
        open_context: Callable[[ContextWork], Encoding | EncodedContext | None] | None = None,
    ) -> None:
        self.engine = engine
        self._max_batch_size = max_batch_size
        self._steps_per_block = steps_per_block
        self._open_context = open_context or (lambda work: engine.begin(work.ids))
        self._waiting: deque[Question] = deque()
        self._live: list[_Live] = []
        self._encoding: tuple[ContextWork, Encoding] | None = None
        self._steps_since_block = 0

    def add(self, question: Question) -> None:
        """Take a question in."""
        self._waiting.append(question)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._live and self._encoding is None

    @property
    def has_room(self) -> bool:
        """Whether fewer questions have been taken in than answers can be under way."""
        return len(self._waiting) + len(self._live) < self._max_batch_size

    @property
    def works_in_use(self) -> list[ContextWork]:
        """Contexts that something hangs on and that take memory, some more than once."""
        questions = [live.question for live in self._live] + list(self._waiting)
        encoded = [question.work for question in questions if question.work.context is not None]
        return encoded + ([self._encoding[0]] if self._encoding else [])

    def step(self) -> list[Question]:
        """One block of a context, or one token of all live answers; the questions that are answered with it."""
        self._schedule()
        if self._encoding and (not self._live or self._steps_since_block >= self._steps_per_block):
            self._steps_since_block = 0
            self._encode(*self._encoding)
            return []
        if not self._live:
            assert not self._waiting, "a context that fits alone is opened when nothing else is in use"
            return []
        self._steps_since_block += 1
        return self._decode()

    def answer(self, question: Question) -> None:
        """Steps until this one is answered."""
        self.add(question)
        while question not in self.step():
            pass

    def run(self) -> list[Question]:
        """Steps until nothing is left; all questions, in the order in which they were answered."""
        answered: list[Question] = []
        while not self.is_idle:
            answered += self.step()
        return answered

    def _schedule(self) -> None:
        """Live answers where there is room for them; the next context to encode, for the sake of the next question."""
        for question in list(self._waiting):
            if len(self._live) >= self._max_batch_size:
                return
            work = question.work
            if work.context is None and self._encoding is None:
                self._open(question)
            if work.context is not None:
                self._waiting.remove(question)
                self._admit(question, work.context)

    def _open(self, question: Question) -> None:
        work, started = question.work, time.perf_counter()
        opened = self._open_context(work)
        if opened is None:
            return
        work.began = started
        if isinstance(opened, EncodedContext):
            self._there(work, opened)
        else:
            self._encoding = work, opened

    def _admit(self, question: Question, context: EncodedContext) -> None:
        sequence = question.sequence
        if sequence is None:
            sequence = self.engine.sequence(context, max_tokens=len(question.query_ids) + question.max_tokens)
        question.tokens = [[] for _ in question.answers]
        question.left = len(question.answers)
        self._live.append(_Live(question, sequence, question.query_ids))

    def _encode(self, work: ContextWork, encoding: Encoding) -> None:
        if encoding.advance():
            work.on_block()
        if not encoding.steps_left:
            self._encoding = None
            self._there(work, encoding.context)

    def _there(self, work: ContextWork, context: EncodedContext) -> None:
        work.context = context
        work.report = self.engine.prefill_report(context)
        work.on_encoded(context)

    def _decode(self) -> list[Question]:
        logits = self.engine.decode([(live.sequence, live.run) for live in self._live])
        rows = [(row, sample) for row, live in enumerate(self._live) for sample in _samples(live)]
        chosen = None
        if logits is not None:
            chosen = [_choose(self._live[row].question.answers[sample], logits[row]) for row, sample in rows]
        agreed = self.engine.agree(chosen, len(rows))
        answered, going_on = [], []
        for (row, sample), (token, ended) in zip(rows, agreed, strict=True):
            live = self._live[row]
            question = live.question
            sequence = live.sequence.fork() if live.sample is None and sample else live.sequence
            if live.sample is None:
                question.sequences.append(sequence)
            question.tokens[sample].append(token)
            if not ended and len(question.tokens[sample]) < question.max_tokens:
                going_on.append(_Live(question, sequence, [token], sample))
                continue
            question.left -= 1
            if not question.left:
                answered.append(question)
        self._live = going_on
        return answered


def _samples(live: _Live) -> list[int]:
    return list(range(len(live.question.answers))) if live.sample is None else [live.sample]


def _choose(answer: Answer | None, logits: Tensor) -> tuple[int, bool]:
    assert answer is not None, "the replica's first rank chooses"
    return answer.choose(logits)
