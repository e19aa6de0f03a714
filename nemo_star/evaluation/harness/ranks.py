"""What the harness asks for on rank 0, done by all ranks: prompts to answer, continuations to score.

Rank 0 hands a round of work to all ranks, replicas divide it by contexts, rank 0 gets the results. Between two rounds
the other ranks wait in a broadcast on gloo, so idle GPUs rest, and nothing of theirs depends on what the harness does
meanwhile: an error of it ends them, too.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from nemo_star.config.sampling import SamplingParams
from nemo_star.contexts.in_use import ContextsInUse
from nemo_star.engine.scheduler import Question, Scheduler
from nemo_star.evaluation.harness.scoring import Score, scores
from nemo_star.llm.opened import OpenedModel
from nemo_star.parallel.groups import NO_LIMIT, broadcast_orders, gather_objects

_BATCHES = 2
"""Batches of a replica that are answered between two times that results are gathered."""


@dataclass(frozen=True)
class Generate:
    """A prompt to answer; its result is the text."""

    context: array[int]
    query: list[int]
    params: SamplingParams


Work = Generate | Score


@dataclass(frozen=True)
class End:
    """No more work comes."""

    error: str | None = None
    """What went wrong, if something did."""


class Ranks:
    """All ranks of the job, on each of them. Rank 0 calls `done` and `end`, the others `follow`."""

    def __init__(self, llm: OpenedModel) -> None:
        self._llm = llm
        self._control = dist.new_group(timeout=NO_LIMIT, backend="gloo")
        self._store = llm.context_store()
        self._contexts = ContextsInUse(llm.engine, self._store)
        self._scheduler: Scheduler = llm.scheduler(
            max_own_tokens=llm.max_own_tokens(self._store),
            open_context=lambda work: self._contexts.open_even_alone(work, self._scheduler.works_in_use),
        )
        self.is_between_rounds = True

    def done(self, works: Sequence[Work]) -> Iterator[tuple[int, Any]]:
        """On rank 0: places in `works` with their results, as rounds are done; those of one context come together.

        Raises:
            ValueError: a context that cannot be encoded.
        """
        order = _by_context(works)
        size = self._llm.groups.dp.size() * self._llm.max_batch_size * _BATCHES
        for start in range(0, len(order), size):
            places = order[start : start + size]
            (given,) = self._orders([[works[place] for place in places]])
            results, error = self._round(given)
            if error is not None:
                raise ValueError(error)
            for number, place in enumerate(places):
                yield place, results[number]

    def end(self, error: str | None = None) -> None:
        """On rank 0: let the others go."""
        self._orders([End(error)])
        self._close()

    def follow(self) -> None:
        """On the other ranks: work until rank 0 ends.

        Raises:
            ValueError: what went wrong on rank 0.
        """
        while True:
            (order,) = self._orders([])
            if isinstance(order, End):
                self._close()
                if order.error is not None:
                    raise ValueError(order.error)
                return
            self._round(order)

    def _orders(self, given: list[Any]) -> list[Any]:
        """Rank 0's order, on all ranks. Nobody counts the time until it comes."""
        with self._llm.watchdog.suspended("waiting for lm-evaluation-harness"):
            return broadcast_orders(lambda: given, self._control)

    def _close(self) -> None:
        with self._llm.watchdog.suspended("keeping contexts"):
            self._store.close()

    def _round(self, works: list[Work]) -> tuple[dict[int, Any], str | None]:
        """Results of all replicas by number, and what went wrong in one, on all ranks alike."""
        self.is_between_rounds = False
        replica, replicas = self._llm.groups.dp.rank(), self._llm.groups.dp.size()
        contexts = {content: number for number, content in enumerate(dict.fromkeys(map(_key, works)))}
        mine = {n: work for n, work in enumerate(works) if contexts[_key(work)] % replicas == replica}
        with self._llm.watchdog.resumed():
            try:
                found, error = self._results(mine), None
            except ValueError as failure:  # the same on all ranks of a replica; the other replicas know nothing of it
                found, error = {}, str(failure)
            gathered = gather_objects((found, error), self._control)
        self.is_between_rounds = True
        results = {number: result for found, _ in gathered for number, result in found.items()}
        return results, next((error for _, error in gathered if error is not None), None)

    def _results(self, works: dict[int, Work]) -> dict[int, Any]:
        """Of this replica, on its first rank; nothing on its other ranks."""
        asked = {number: self._question(work) for number, work in works.items() if isinstance(work, Generate)}
        for question in asked.values():
            self._scheduler.add(question)
        while not self._scheduler.is_idle:
            for question in self._scheduler.step():
                self._contexts.let_go(question.work)
        for question in asked.values():
            _check(question)
        found: dict[int, Any] = {
            number: self._scores(work) for number, work in works.items() if isinstance(work, Score)
        }
        for number, question in asked.items():
            (result,) = self._llm.results(question)
            found[number] = None if result is None else result.text
        return found if self._llm.is_first_of_replica else {}

    def _question(self, work: Generate) -> Question:
        return self._llm.question(self._contexts.work(work.context), work.query, work.params)

    def _scores(self, work: Score) -> list[tuple[float, bool]]:
        question = Question(self._contexts.work(work.context))
        try:
            self._scheduler.answer(question)
            _check(question)
            assert question.work.context is not None
            return scores(self._llm.engine, question.work.context, work)
        finally:
            self._contexts.let_go(question.work)


def _check(question: Question) -> None:
    if question.work.error is not None:
        raise ValueError(question.work.error)


def _key(work: Work) -> bytes:
    return work.context.tobytes()


def _by_context(works: Sequence[Work]) -> list[int]:
    """Places, those of one context next to each other, contexts in the order in which they came."""
    places: dict[bytes, list[int]] = {}
    for place, work in enumerate(works):
        places.setdefault(_key(work), []).append(place)
    return [place for of_context in places.values() for place in of_context]
