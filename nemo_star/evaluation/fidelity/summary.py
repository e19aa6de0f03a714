"""From lines of samples to a row for each contender, and the verdict."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_star.evaluation.journal import Key
from nemo_star.evaluation.statistics import Interval, bootstrap

Line = Mapping[str, Any]
ALL = "all"


def mean_kl(line: Line) -> float:
    """Nats, over answer positions."""
    return statistics.fmean(line["kl"])


def agreement(line: Line) -> float:
    """Share of answer positions with the same likeliest token."""
    return statistics.fmean(line["agree"])


def is_kept(line: Line) -> float:
    """1 where that is so at all answer positions: decoded greedily, the answer is the same to the last token."""
    return float(all(line["agree"]))


def lost_mass(line: Line) -> float:
    """Share, over all layers and heads."""
    return statistics.fmean(value for layer in line["lost"] for value in layer)


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
    kept: float
    """0 to 100, of answers."""
    query_agreement: float | None
    """0 to 100, of query positions; None where queries are one token long."""
    lost: float
    """0 to 100, of attention mass in the blocks after the first."""


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
    return [
        line
        for key, line in lines.items()
        if key[0] == contender and key[2] == length and task in (key[1], ALL)
    ]


def _summary(contender: str, task: str, length: int, lines: list[Line]) -> Summary:
    query = [value for line in lines for value in line["query_agree"]]
    return Summary(
        contender,
        task,
        length,
        len(lines),
        bootstrap([100 * agreement(line) for line in lines]),
        bootstrap([mean_kl(line) for line in lines]),
        100 * statistics.fmean(map(is_kept, lines)),
        100 * statistics.fmean(query) if query else None,
        100 * statistics.fmean(map(lost_mass, lines)),
    )
