"""Tables of what was found; each becomes a CSV file."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_star.evaluation.fidelity.scores import Scores, points
from nemo_star.evaluation.fidelity.summary import ALL, MEASURES, Line, Summary, of, summaries
from nemo_star.evaluation.journal import Key


@dataclass(frozen=True)
class Table:
    """Rows under titles; a file of the report's folder."""

    titles: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def column(self, title: str) -> list[Any]:
        """Values of one column."""
        place = self.titles.index(title)
        return [row[place] for row in self.rows]

    def means(self, by: str, of: str) -> dict[Any, float]:
        """Mean of one column for each value of another, in order of these."""
        values: dict[Any, list[float]] = {}
        for key, value in zip(self.column(by), self.column(of), strict=True):
            values.setdefault(key, []).append(value)
        return {key: statistics.fmean(values[key]) for key in sorted(values)}

    def where(self, **values: Any) -> Table:
        """The rows that have these values."""
        places = {self.titles.index(name): value for name, value in values.items()}
        return Table(self.titles, [row for row in self.rows if all(row[at] == value for at, value in places.items())])


def collect(lines: Mapping[Key, Line], contenders: Sequence[str], scores: Scores, tolerance: float) -> dict[str, Table]:
    """By the file's name, without .csv; those that have rows.

    Args:
        scores: of an evaluation on the same samples; empty: none.
        tolerance: as of `Summary.verdict`.

    Raises:
        ValueError: the scores are of other samples.
    """
    rows = summaries(lines, contenders)
    tables = {
        "summary": _summary(rows, tolerance),
        "positions": Table(
            ("contender", "length", "part", "position", "samples", "kl", "agreement"),
            list(_positions(lines, contenders)),
        ),
        "blocks": Table(
            ("contender", "length", "by", "block", "blocks", "samples", "kl", "agreement", "kept"),
            list(_blocks(lines, contenders)),
        ),
        "heads": Table(("contender", "length", "layer", "head", "lost"), list(_heads(lines, contenders))),
        "lost_by_block": Table(("contender", "length", "layer", "block", "lost"), list(_lost(lines, contenders))),
        "first_tokens": Table(
            ("contender", "length", "variant", "where", "layer", "token", "mass"), list(_firsts(lines, contenders))
        ),
    }
    if scores:
        means = points(lines, scores)
        tables["scores"] = Table(
            ("contender", "length", "samples", "score", *MEASURES),
            [(each.contender, each.length, each.samples, each.score, *each.fidelity.values()) for each in means],
        )
    return {name: table for name, table in tables.items() if table.rows}


def _summary(rows: Iterable[Summary], tolerance: float) -> Table:
    titles = "task length contender samples agreement low high kl kl_low kl_high kept kept_low kept_high".split()
    return Table(
        (*titles, "query_agreement", "lost", "verdict"),
        [
            (
                row.task,
                row.length,
                row.contender,
                row.samples,
                *(value for each in (row.agreement, row.kl, row.kept) for value in (each.mean, each.low, each.high)),
                row.query_agreement,
                row.lost,
                row.verdict(tolerance),
            )
            for row in rows
        ],
    )


def _groups(lines: Mapping[Key, Line], contenders: Iterable[str]) -> Iterator[tuple[str, int, list[Line]]]:
    """(contender, length, lines of all tasks)."""
    for length in sorted({key[2] for key in lines}):
        for contender in contenders:
            if mine := of(lines, contender, ALL, length):
                yield contender, length, mine


def _positions(lines: Mapping[Key, Line], contenders: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    """From 1 on, in the query and in the answer; a query's first token is not predicted by one of its own."""
    for contender, length, mine in _groups(lines, contenders):
        for part, kl, agree, first in (("query", "query_kl", "query_agree", 2), ("answer", "kl", "agree", 1)):
            for place in range(max(len(line[kl]) for line in mine)):
                here = [line for line in mine if len(line[kl]) > place]
                yield (
                    contender,
                    length,
                    part,
                    first + place,
                    len(here),
                    statistics.fmean(line[kl][place] for line in here),
                    100 * statistics.fmean(line[agree][place] for line in here),
                )


def _blocks(lines: Mapping[Key, Line], contenders: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    """From 1 on. By what is known where it is, and by where dense attention looks when it answers."""
    for contender, length, mine in _groups(lines, contenders):
        for by, name in (("place", "known_block"), ("attention", "block")):
            for block in sorted({line[name] for line in mine if line[name] is not None}):
                here = [line for line in mine if line[name] == block]
                means = (MEASURES["mean KL"], MEASURES["top-1 agreement"], MEASURES["answers kept"])
                kl, agreement, kept = (statistics.fmean(map(measure, here)) for measure in means)
                blocks = max(line["blocks"] for line in mine)
                yield contender, length, by, block + 1, blocks, len(here), kl, 100 * agreement, 100 * kept


def _heads(lines: Mapping[Key, Line], contenders: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    """From 1 on, as Megatron numbers layers; those that lose most first."""
    for contender, length, mine in _groups(lines, contenders):
        rows = [
            (contender, length, layer + 1, head + 1, 100 * statistics.fmean(line["lost"][layer][head] for line in mine))
            for layer, heads in enumerate(mine[0]["lost"])
            for head in range(len(heads))
        ]
        yield from sorted(rows, key=lambda row: -row[-1])


def _lost(lines: Mapping[Key, Line], contenders: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    for contender, length, mine in _groups(lines, contenders):
        for layer in range(len(mine[0]["lost_by_block"])):
            for block in range(max(line["blocks"] for line in mine)):
                here = [line["lost_by_block"][layer][block] for line in mine if line["blocks"] > block]
                yield contender, length, layer + 1, block + 1, 100 * statistics.fmean(here)


def _firsts(lines: Mapping[Key, Line], contenders: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    """Tokens from 1 on; shares."""
    for contender, length, mine in _groups(lines, contenders):
        measured = [line["first_tokens"] for line in mine if "first_tokens" in line]
        for variant in measured[0] if measured else ():
            for where in measured[0][variant]:
                for layer, tokens in enumerate(measured[0][variant][where]):
                    for token in range(len(tokens)):
                        mass = statistics.fmean(each[variant][where][layer][token] for each in measured)
                        yield contender, length, variant, where, layer + 1, token + 1, mass


def comma_separated(table: Table) -> str:
    """The table as a file."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table.titles)
    writer.writerows(table.rows)
    return file.getvalue()
