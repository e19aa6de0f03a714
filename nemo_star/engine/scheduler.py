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

MAX_STEP_TOKENS = 8192
"""Of all sequences in one step, unless a single query is longer: long queries that come together run one after another,
and what a step takes in memory does not grow with their number."""


class Answer(Protocol):
    """What becomes of one sample's tokens, on the rank that chooses."""

    def choose(self, logits: Tensor) -> tuple[int, bool]:
        """Logits [vocab] float32 -> (token, whether it ends the answer)."""
        ...


@dataclass(eq=False)
class ContextWork:
    """A context that questions hang on: encoded, or to be encoded when its turn comes."""

    ids: Ids[int] | Tensor = ()
    owner: str = ""
    """Whose it is, for a store of contexts."""
    context: EncodedContext | None = None
    on_block: Callable[[], None] = lambda: None
    """Called after each block that this rank has encoded."""
    on_encoded: Callable[[EncodedContext], None] = lambda context: None
    """Called when it is there, encoded or found."""
    encoding: Encoding | None = None
    """Its way there, from when its turn came."""
    report: PrefillReport | None = None
    """What encoding took, once it is done here."""
    began: float | None = None
    """When encoding began (`time.perf_counter`)."""
    found_tokens: int = 0
    """Of it, known when its turn came: not encoded for it."""
    error: str | None = None
    """Why it cannot be opened."""


@dataclass(eq=False)
class Question:
    """One query on a context, and its answers; or none, where the context is all that is asked for."""

    work: ContextWork
    query_ids: list[int] = field(default_factory=list)
    max_tokens: int = 0
    answers: Ids[Answer | None] = ()
    """One for each sample; None on ranks that do not choose."""
    scores_query: bool = False
    """Whether the logits after each token of the query are wanted, alike on all ranks."""
    on_scores: Callable[[Tensor], None] = lambda logits: None
    """Called with them, [query tokens, vocab] float32, on the rank that chooses."""
    sequence: Sequence | None = None
    """To go on with; None: a new one. Each answer's sequence is found in `sequences`, less the last token."""
    sequences: list[Sequence] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    """Generated ones of each answer."""
    left: int = 0
    """Answers under way."""

    @property
    def own_tokens(self) -> int:
        """Of query and answers, at most."""
        return len(self.answers) * (len(self.query_ids) + self.max_tokens)


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
        max_encodings: contexts being encoded at the same time: the one that came first and the one with least left take
            turns, so that a short one passes a long one, which still goes on.
        max_own_tokens: queries and answers of all that are under way at the same time may come to so many tokens, whose
            K/V take memory beside the contexts'; None: any number.
        steps_per_block: tokens that live answers get between two blocks of a context being encoded.
        open_context: an encoding for a context whose turn it is, or the context itself where it is known already; None
            while there is no room for it beside those in use; ValueError, alike on all ranks: its questions end with
            this error. By default every context is encoded.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch_size: int,
        max_encodings: int = 1,
        max_own_tokens: int | None = None,
        steps_per_block: int = 1,
        open_context: Callable[[ContextWork], Encoding | EncodedContext | None] | None = None,
    ) -> None:
        self.engine = engine
        self._max_batch_size = max_batch_size
        self._max_encodings = max_encodings
        self._max_own_tokens = max_own_tokens
        self._steps_per_block = steps_per_block
        self._open_context = open_context or (lambda work: engine.begin(work.ids))
        self._waiting: deque[Question] = deque()
        self._live: list[_Live] = []
        self._encodings: list[tuple[ContextWork, Encoding]] = []  # in the order in which they came
        self._steps_since_block = 0
        self._blocks = 0
        self._is_full = False  # no room for the next context, until something changes

    def add(self, question: Question) -> None:
        """Take a question in."""
        self._waiting.append(question)

    def cancel(self, question: Question) -> None:
        """Drop a question that is not answered yet. Where nobody else asks for its context, its encoding stops after
        the block that was last, and is left to whoever gave it."""
        if question in self._waiting:
            self._waiting.remove(question)
        self._live = [live for live in self._live if live.question is not question]
        if all(other.work is not question.work for other in self._waiting):
            self._encodings = [encoding for encoding in self._encodings if encoding[0] is not question.work]
        self.look_again()

    def look_again(self) -> None:
        """There may be room for a further context now. The scheduler knows so itself when a question ends."""
        self._is_full = False

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._live and not self._encodings

    @property
    def has_room(self) -> bool:
        """Whether fewer questions have been taken in than answers can be under way."""
        return len(self._waiting) + len(self._live) < self._max_batch_size

    @property
    def live(self) -> int:
        """Answers under way, or about to be."""
        return sum(len(_samples(live)) for live in self._live)

    @property
    def encodings(self) -> list[tuple[ContextWork, Encoding]]:
        """Contexts being encoded, in the order in which they came."""
        return list(self._encodings)

    @property
    def works_in_use(self) -> list[ContextWork]:
        """Contexts that something hangs on and that take memory, some more than once."""
        questions = [live.question for live in self._live] + list(self._waiting)
        encoded = [question.work for question in questions if question.work.context is not None]
        return encoded + [work for work, _ in self._encodings]

    def step(self) -> list[Question]:
        """One block of a context, or one token of all live answers; the questions that are answered with it, or cannot
        be."""
        done = self._schedule()
        if done:
            return done
        if self._encodings and (not self._live or self._steps_since_block >= self._steps_per_block):
            self._steps_since_block = 0
            self._encode(*self._next_encoding())
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

    def _schedule(self) -> list[Question]:
        """Live answers where there is room for them; contexts to encode, for the sake of the next questions. What is
        done without a token: questions whose context is all that they ask for, or cannot be had."""
        done: list[Question] = []
        has_room = True  # whoever is next waits for room, and nobody passes: many answers would never find any
        for question in list(self._waiting):
            work = question.work
            can_open = not self._is_full and len(self._encodings) < self._max_encodings
            if work.context is None and work.error is None and can_open:
                self._open(work)
            if work.context is not None and work.began is None:  # it was there before
                work.began = time.perf_counter()
                self._there(work, work.context)
            if work.error is not None or (work.context is not None and not question.answers):
                self._waiting.remove(question)
                done.append(question)
            elif work.context is not None and (has_room := has_room and self._has_room_for(question)):
                self._waiting.remove(question)
                self._admit(question, work.context)
        if done:
            self.look_again()
        return done

    def _has_room_for(self, question: Question) -> bool:
        """Beside those under way; alone there is room for whatever was taken in."""
        if not self._live:
            return True
        under_way = {id(live.question): live.question for live in self._live}.values()
        own_tokens = question.own_tokens + sum(other.own_tokens for other in under_way)
        next_tokens = len(question.query_ids) + sum(len(live.run) for live in self._live)
        return (
            self.live + len(question.answers) <= self._max_batch_size
            and (self._max_own_tokens is None or own_tokens <= self._max_own_tokens)
            and next_tokens <= MAX_STEP_TOKENS
        )

    def _open(self, work: ContextWork) -> None:
        if any(other is work for other, _ in self._encodings):
            return
        started = time.perf_counter()
        try:
            opened = self._open_context(work)
        except ValueError as error:
            work.error = str(error)
            return
        if opened is None:
            self._is_full = True
            return
        work.began = started
        if isinstance(opened, EncodedContext):
            work.found_tokens = opened.tokens
            self._there(work, opened)
        else:
            work.found_tokens, work.encoding = opened.context.tokens, opened
            self._encodings.append((work, opened))

    def _next_encoding(self) -> tuple[ContextWork, Encoding]:
        self._blocks += 1
        shortest = min(self._encodings, key=lambda encoding: encoding[1].steps_left)
        return shortest if self._blocks % 2 else self._encodings[0]

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
            self._encodings = [other for other in self._encodings if other[1] is not encoding]
            self._there(work, encoding.context)

    def _there(self, work: ContextWork, context: EncodedContext) -> None:
        self.look_again()
        work.context = context
        work.report = self.engine.prefill_report(context)
        work.on_encoded(context)

    def _decode(self) -> list[Question]:
        scored = [row for row, live in enumerate(self._live) if live.sample is None and live.question.scores_query]
        logits = self.engine.decode([(live.sequence, live.run) for live in self._live], scored=scored)
        rows = [(row, sample) for row, live in enumerate(self._live) for sample in _samples(live)]
        chosen = None
        if logits is not None:
            sizes = [len(live.run) if row in scored else 1 for row, live in enumerate(self._live)]
            after = logits.split(sizes)
            for row in scored:
                self._live[row].question.on_scores(after[row])
            chosen = [_choose(self._live[row].question.answers[sample], after[row][-1]) for row, sample in rows]
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
        if answered:
            self.look_again()
        return answered


def _samples(live: _Live) -> list[int]:
    return list(range(len(live.question.answers))) if live.sample is None else [live.sample]


def _choose(answer: Answer | None, logits: Tensor) -> tuple[int, bool]:
    assert answer is not None, "the replica's first rank chooses"
    return answer.choose(logits)
