"""From lines of samples to a row for each contender, and the verdict."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_star.evaluation.journal import Key
from nemo_star.evaluation.statistics import Interval, bootstrap, wilson

Line = Mapping[str, Any]
ALL = "all"
SAFE, EDGE, NOT_SAFE = "safe", "at the edge", "not safe"
MIN_SAMPLES = 20
"""For the bootstrap's interval of agreement to say that something is safe: of a few samples it may be too narrow."""


def mean_kl(line: Line) -> float:
    """Nats, over answer positions."""
    return statistics.fmean(line["kl"])


def agreement(line: Line) -> float:
    """Share of answer positions with the same likeliest token."""
    return statistics.fmean(line["agree"])


def is_kept(line: Line) -> int:
    """1 where that is so at all answer positions: decoded greedily, the answer is the same to the last token."""
    return int(all(line["agree"]))


def lost_mass(line: Line) -> float:
    """Share, over the heads of all layers but the last: nobody reads what that one gives in prefill."""
    layers = line["lost"][:-1] or line["lost"]
    return statistics.fmean(value for layer in layers for value in layer)


MEASURES: dict[str, Callable[[Line], float]] = {
    "top-1 agreement": agreement,
    "mean KL": mean_kl,
    "answers kept": is_kept,
    "lost mass": lost_mass,
}
"""Name -> of one sample."""


@dataclass(frozen=True)
class Summary:
    """One contender on the samples of one task (or all) at one length."""

    contender: str
    task: str
    length: int
    samples: int
    agreement: Interval
    """0 to 100, of answer positions."""
    kl: Interval
    """Nats, of answer positions."""
    kept: Interval
    """0 to 100, of answers."""
    query_agreement: float | None
    """0 to 100, of query positions; None where queries are one token long."""
    lost: float
    """0 to 100, of attention mass in the blocks after the first."""
    given: bool
    """Whether any answer was given: not what dense attention answers."""

    def verdict(self, tolerance: float) -> str:
        """Whether 95% intervals tell it from `tolerance`, of 100.

        Where dense attention's own answers are the teacher, by the answers kept: an answer that is the same has the
        same score, so no score can fall by more points than answers of 100 change. Where answers were given, by top-1
        agreement: there a tenth of the tolerance goes for tokens.
        """
        least = 100 - (tolerance / 10 if self.given else tolerance)
        interval = self.agreement if self.given else self.kept
        if interval.low >= least and (not self.given or self.samples >= MIN_SAMPLES):
            return SAFE
        return NOT_SAFE if interval.high < least else EDGE


def summaries(lines: Mapping[Key, Line], contenders: Iterable[str]) -> list[Summary]:
    """All rows, those of one length and task next to each other."""
    found = []
    contenders = list(contenders)
    for length in sorted({key[2] for key in lines}):
        tasks = list(dict.fromkeys(key[1] for key in lines if key[2] == length))
        for task in [*tasks, ALL] if len(tasks) > 1 else tasks:
            for contender in contenders:
                if mine := of(lines, contender, task, length):
                    found.append(_summary(contender, task, length, mine))
    return found


def of(lines: Mapping[Key, Line], contender: str, task: str, length: int) -> list[Line]:
    """The lines of one row."""
    return [line for key, line in lines.items() if key[0] == contender and key[2] == length and task in (key[1], ALL)]


def _summary(contender: str, task: str, length: int, lines: list[Line]) -> Summary:
    query = [value for line in lines for value in line["query_agree"]]
    return Summary(
        contender,
        task,
        length,
        len(lines),
        bootstrap([100 * agreement(line) for line in lines]),
        bootstrap([mean_kl(line) for line in lines]),
        wilson(sum(map(is_kept, lines)), len(lines)),
        100 * statistics.fmean(query) if query else None,
        100 * statistics.fmean(map(lost_mass, lines)),
        any(line["given"] for line in lines),
    )
