"""What a sweep found: a table by task and length, differences paired by sample, the frontier of accuracy and time."""

from __future__ import annotations

import csv
import importlib.util
import io
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_star.evaluation.journal import Key
from nemo_star.evaluation.statistics import Interval, bootstrap
from nemo_star.runtime.files import write_whole

Line = Mapping[str, Any]
ALL_TASKS = "all"
_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Cell:
    """One contender on the samples of one task (or all) at one length."""

    contender: str
    task: str
    length: int
    samples: int
    score: Interval
    """0 to 100."""
    difference: Interval | None
    """To the baseline, over the samples that both answered; None of the baseline itself."""
    prefill_seconds: float
    """Median, of all ranks of a replica together: methods may run on different numbers of ranks."""
    speedup: float | None
    """The baseline's median over this one's."""


def cells(lines: Mapping[Key, Line], contenders: list[str]) -> list[Cell]:
    """All cells; the first contender is the baseline."""
    found = []
    for length in sorted({key[2] for key in lines}):
        tasks = list(dict.fromkeys(key[1] for key in lines if key[2] == length))
        for task in [*tasks, ALL_TASKS] if len(tasks) > 1 else tasks:
            base = _of(lines, contenders[0], task, length)
            for contender in contenders:
                if mine := _of(lines, contender, task, length):
                    found.append(_cell(contender, task, length, mine, base, is_base=contender == contenders[0]))
    return found


def _of(lines: Mapping[Key, Line], contender: str, task: str, length: int) -> dict[tuple[str, str], Line]:
    """By task and id."""
    return {
        (key[1], key[3]): line
        for key, line in lines.items()
        if key[0] == contender and key[2] == length and task in (key[1], ALL_TASKS)
    }


def _cell(
    contender: str,
    task: str,
    length: int,
    mine: Mapping[tuple[str, str], Line],
    base: Mapping[tuple[str, str], Line],
    *,
    is_base: bool,
) -> Cell:
    both = [key for key in mine if key in base]
    seconds = _rank_seconds(mine)
    base_seconds = _rank_seconds(base) if base else None
    difference = None
    if both and not is_base:
        difference = bootstrap([mine[key]["score"] - base[key]["score"] for key in both])
    return Cell(
        contender,
        task,
        length,
        len(mine),
        bootstrap([line["score"] for line in mine.values()]),
        difference,
        seconds,
        None if is_base or base_seconds is None else base_seconds / seconds,
    )


def _rank_seconds(lines: Mapping[tuple[str, str], Line]) -> float:
    return statistics.median(line["prefill_seconds"] * line["ranks"] for line in lines.values())


def write_report(folder: Path, lines: Mapping[Key, Line], contenders: list[str], *, about: str) -> str:
    """report.md, report.csv and, with matplotlib, frontier.png; the Markdown.

    Args:
        about: a line on model, machine and commit.
    """
    found = cells(lines, contenders)
    text = markdown(found, contenders[0], about)
    write_whole(folder / "report.md", lambda file: file.write_text(text, encoding="utf-8"))
    write_whole(folder / "report.csv", lambda file: file.write_text(comma_separated(found), encoding="utf-8"))
    _draw(found, folder / "frontier.png", contenders[0])
    return text


def markdown(found: Iterable[Cell], baseline: str, about: str) -> str:
    """A table for each length."""
    found = list(found)
    parts = [f"# Accuracy\n\n{about}\n"]
    for length in sorted({cell.length for cell in found}):
        parts.append(f"\n## {length} tokens\n")
        parts.append(
            f"Scores of 100, means with 95% intervals (bootstrap); differences to {baseline}, paired by sample; "
            "median prefill time, in seconds of one rank.\n"
        )
        parts.append("| task | attention | samples | score | difference | prefill rank-s | times faster |")
        parts.append("|---|---|---:|---:|---:|---:|---:|")
        for cell in found:
            if cell.length == length:
                difference = "" if cell.difference is None else str(cell.difference)
                faster = "" if cell.speedup is None else f"{cell.speedup:.2f}"
                parts.append(
                    f"| {cell.task} | {cell.contender} | {cell.samples} | {cell.score} | {difference} | "
                    f"{cell.prefill_seconds:.3g} | {faster} |"
                )
    return "\n".join(parts) + "\n"


def comma_separated(found: Iterable[Cell]) -> str:
    """A line for each cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        "contender task length samples score low high difference difference_low difference_high prefill_rank_seconds "
        "speedup".split()
    )
    for cell in found:
        difference: tuple[object, ...] = ("", "", "")
        if cell.difference is not None:
            difference = (cell.difference.mean, cell.difference.low, cell.difference.high)
        score = (cell.score.mean, cell.score.low, cell.score.high)
        speedup = "" if cell.speedup is None else cell.speedup
        writer.writerow(
            [cell.contender, cell.task, cell.length, cell.samples, *score, *difference, cell.prefill_seconds, speedup]
        )
    return file.getvalue()


def _draw(found: list[Cell], file: Path, baseline: str) -> None:
    """Accuracy lost against prefill time saved, over all tasks: a colour for each length, a marker for each way to
    attend, its blocks beside the points."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure  # no pyplot: no windows, no state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    tasks = {cell.task for cell in found}
    over = ALL_TASKS if ALL_TASKS in tasks else next(iter(tasks), "")
    series: dict[tuple[str, int], list[tuple[str, float, Interval]]] = {}
    for cell in found:
        if cell.task == over and cell.difference is not None and cell.speedup is not None:
            way, blocks = _parted(cell.contender)
            series.setdefault((way, cell.length), []).append((blocks, cell.speedup, cell.difference))
    ways, lengths = (list(dict.fromkeys(key[place] for key in series)) for place in (0, 1))
    for (way, length), points in series.items():
        axes.errorbar(
            [speedup for _, speedup, _ in points],
            [difference.mean for _, _, difference in points],
            yerr=[
                [difference.mean - difference.low for _, _, difference in points],
                [difference.high - difference.mean for _, _, difference in points],
            ],
            marker=_MARKERS[ways.index(way) % len(_MARKERS)],
            color=f"C{lengths.index(length)}",
            linestyle="none",
            capsize=3,
            label=f"{way}, {length:,} tokens",
        )
        for blocks, speedup, difference in points:
            axes.annotate(blocks, (speedup, difference.mean), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xlabel(f"prefill: times as fast as {baseline}")
    axes.set_ylabel(f"score minus {baseline}, points of 100")
    if series:
        axes.legend()
    write_whole(file, lambda target: figure.savefig(target, format="png", dpi=120))


def _parted(contender: str) -> tuple[str, str]:
    """What a contender is but for its blocks, and their size: star n/4 overlap 64 -> (star overlap 64, n/4)."""
    word, *rest = contender.split()
    has_blocks = bool(rest) and rest[0] not in ("anchor", "overlap")
    return " ".join([word, *rest[has_blocks:]]), rest[0] if has_blocks else ""
