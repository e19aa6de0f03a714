"""Fidelity against what an evaluation scored on the same samples: does the one say what the other does?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_star.evaluation.fidelity.summary import MEASURES, Line
from nemo_star.evaluation.journal import Key, read_journal
from nemo_star.evaluation.statistics import spearman

DENSE = "dense"
"""The reference's name in an evaluation."""
_SAME = ("seed", "variant", "input", "chat", "data")
"""Keys that decide what a sample is."""

Scores = Mapping[Key, Mapping[str, Any]]


@dataclass(frozen=True)
class Point:
    """One contender at one length, over all samples that both measured."""

    contender: str
    length: int
    samples: int
    score: float
    """0 to 100."""
    fidelity: dict[str, float]
    """By measure."""


def read_scores(folder: Path, sweep: Mapping[str, Any]) -> Scores:
    """The lines of an evaluation's folder.

    Raises:
        ValueError: there are none, or they are of other samples.
    """
    before, lines, _ = read_journal(folder)
    if not lines:
        raise ValueError(f"scores={folder} holds no samples of nemo-star evaluate")
    if changed := [name for name in _SAME if before.get(name) != sweep.get(name)]:
        raise ValueError(f"scores={folder} is of a sweep with other keys: {', '.join(changed)}")
    return lines


def points(lines: Mapping[Key, Line], scores: Scores) -> list[Point]:
    """Means of contenders, and dense attention itself where it was scored.

    Raises:
        ValueError: the scores are of other samples.
    """
    if not any(key in scores for key in lines):
        names = sorted({key[0] for key in lines})
        raise ValueError(f"scores: no sample there is one of these, of these methods: {', '.join(names)}")
    found = []
    for length in sorted({key[2] for key in lines}):
        of_length = [key for key in lines if key[2] == length and key in scores]
        for key in of_length:
            if scores[key]["context_tokens"] != lines[key]["context_tokens"]:
                raise ValueError(f"scores: sample {key[3]} of {key[1]} has another context there: other samples")
        for contender in dict.fromkeys(key[0] for key in of_length):
            mine = [key for key in of_length if key[0] == contender]
            score = statistics.fmean(scores[key]["score"] for key in mine)
            fidelity = {
                name: statistics.fmean(of_line(lines[key]) for key in mine) for name, of_line in MEASURES.items()
            }
            found.append(Point(contender, length, len(mine), score, fidelity))
        ids = {key[1:] for key in of_length}
        dense = [scores[DENSE, *rest]["score"] for rest in ids if (DENSE, *rest) in scores]
        if dense:
            found.append(Point(DENSE, length, len(dense), statistics.fmean(dense), perfect()))
    return found


def perfect() -> dict[str, float]:
    """Of a method against itself."""
    return {name: of_line({"kl": [0.0], "agree": [1], "lost": [[0.0]]}) for name, of_line in MEASURES.items()}


def correlations(lines: Mapping[Key, Line], scores: Scores) -> list[tuple[str, float | None, float | None]]:
    """For each measure: Spearman's rank correlation with the score, over the means of contenders (those of a length
    beside each other, and dense attention), and over single samples of contenders against score minus dense's."""
    means = points(lines, scores)
    single = [
        (line, scores[key]["score"] - scores[DENSE, *key[1:]]["score"])
        for key, line in lines.items()
        if key in scores and (DENSE, *key[1:]) in scores
    ]
    found = []
    for name, of_line in MEASURES.items():
        over_means = spearman([point.fidelity[name] for point in means], [point.score for point in means])
        over_samples = spearman([of_line(line) for line, _ in single], [difference for _, difference in single])
        found.append((name, over_means, over_samples))
    return found


def largest_losses(lines: Mapping[Key, Line], scores: Scores) -> list[tuple[str, int, float, float]]:
    """(contender, length, points of 100 below dense, share of changed answers in points): the first is at most the
    second, where the teacher is dense attention's own answer."""
    found = []
    for point in points(lines, scores):
        dense = [
            scores[DENSE, *key[1:]]["score"] for key in lines if key[0] == point.contender and key[2] == point.length
        ]
        if point.contender != DENSE and dense:
            lost = statistics.fmean(dense) - point.score
            found.append((point.contender, point.length, lost, 100 * (1 - point.fidelity["answers kept"])))
    return found
