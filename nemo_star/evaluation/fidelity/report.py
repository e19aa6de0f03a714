"""What was found, for a person: Markdown, with a CSV file for each table, and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_star.evaluation.fidelity.pictures import draw
from nemo_star.evaluation.fidelity.readings import FIRST_TOKENS
from nemo_star.evaluation.fidelity.scores import Scores, correlations, largest_losses
from nemo_star.evaluation.fidelity.summary import Line
from nemo_star.evaluation.fidelity.tables import Table, collect, comma_separated
from nemo_star.evaluation.journal import Key
from nemo_star.runtime.files import write_whole

TOP_HEADS = 8
"""Of the report; heads.csv has all."""


def write_report(
    folder: Path,
    lines: Mapping[Key, Line],
    contenders: Sequence[str],
    scores: Scores,
    *,
    tolerance: float,
    about: str,
) -> str:
    """report.md, CSV files and, with matplotlib, pictures; the Markdown.

    Args:
        about: a line on model, machine and commit.
        scores, tolerance: as of `collect`.

    Raises:
        ValueError: the scores are of other samples.
    """
    tables = collect(lines, contenders, scores, tolerance)
    sections = [f"# Fidelity to dense attention\n\n{about}\n", *_summary(tables["summary"], tolerance)]
    sections += [*_positions(tables["positions"]), *_blocks(tables["blocks"], lines), *_heads(tables["heads"])]
    if "first_tokens" in tables:
        sections += _first_tokens(tables["first_tokens"])
    if scores:
        sections += _scores(lines, scores)
    text = "\n".join(sections) + "\n"
    write_whole(folder / "report.md", lambda file: file.write_text(text, encoding="utf-8"))
    for name, table in tables.items():
        content = comma_separated(table)
        write_whole(folder / f"{name}.csv", lambda file, content=content: file.write_text(content, encoding="utf-8"))  # type: ignore[misc]
    draw(tables, folder)
    return text


def _table(titles: Sequence[str], rows: Iterable[Sequence[Any]], *, texts: int) -> Iterator[str]:
    """Markdown; the first `texts` columns are aligned to the left."""
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * texts}{'---:|' * (len(titles) - texts)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _summary(table: Table, tolerance: float) -> Iterator[str]:
    yield (
        "Dense attention's answer, or the one given, runs on both. Kept: answers of 100 with the same likeliest "
        "token everywhere; decoded greedily they come out the same, so that no score of dense attention's own answers "
        "can fall by more points than answers change. Agreement: tokens of 100; KL(dense || method): nats a token; "
        "lost: percent of dense attention's mass, in blocks after the first and layers before the last, on tokens that "
        "the method does not see. "
        f"Intervals of 95%. Safe: no more than {tolerance:g} answers of 100 change, or of given answers "
        f"{tolerance / 10:g} tokens of 100; not safe: more do; at the edge: the samples do not tell."
    )
    for length in dict.fromkeys(table.column("length")):
        rows = [dict(zip(table.titles, row, strict=True)) for row in table.where(length=length).rows]
        yield f"\n## {length} tokens\n"
        yield from _table(
            ("task", "attention", "verdict", "samples", "kept", "agreement", "KL", "lost"),
            [
                (
                    row["task"],
                    row["contender"],
                    row["verdict"],
                    row["samples"],
                    f"{row['kept']:.1f} [{row['kept_low']:.1f}, {row['kept_high']:.1f}]",
                    f"{row['agreement']:.1f} [{row['low']:.1f}, {row['high']:.1f}]",
                    f"{row['kl']:.2g} [{row['kl_low']:.2g}, {row['kl_high']:.2g}]",
                    f"{row['lost']:.1f}",
                )
                for row in rows
            ],
            texts=3,
        )


def _positions(table: Table) -> Iterator[str]:
    """Positions in octaves: 1, 2, 3 to 4, 5 to 8."""
    yield "\n## By position\n\nAgreement of 100, by the token's place (positions.csv, positions.png).\n"
    octave = [(value - 1).bit_length() for value in table.column("position")]
    columns = [
        (part, each)
        for part in ("query", "answer")
        for each in sorted({o for o, of in zip(octave, table.column("part"), strict=True) if of == part})
    ]
    rows = []
    for length, contender in dict.fromkeys(zip(table.column("length"), table.column("contender"), strict=True)):
        cells = []
        for part, wanted in columns:
            some = table.where(length=length, contender=contender, part=part).rows
            found = [row for row in some if (row[3] - 1).bit_length() == wanted]
            count = sum(row[4] for row in found)
            cells.append(f"{sum(row[4] * row[6] for row in found) / count:.1f}" if count else "")
        rows.append((length, contender, *cells))
    names = [f"{part} {_octave(each)}" for part, each in columns]
    yield from _table(("tokens", "attention", *names), rows, texts=2)


def _octave(number: int) -> str:
    last = 2**number
    first = last // 2 + 1
    return str(last) if first >= last else f"{first}-{last}"


def _blocks(table: Table, lines: Mapping[Key, Line]) -> Iterator[str]:
    """The first block, and quarters of all; blocks.csv has each."""
    both = [line for line in lines.values() if line["known_block"] is not None]
    same = sum(line["known_block"] == line["block"] for line in both)
    yield (
        "\n## By block\n\nAnswers kept of 100 (samples), by the block that holds what is asked for, where its place is "
        "known, and by the one with most of dense attention's mass while it answers: the first block, then quarters of "
        f"all blocks. Both name the same block in {same} of {len(both)} cases (blocks.csv).\n"
    )
    rows = []
    keys = zip(*(table.column(name) for name in ("length", "contender", "by")), strict=True)
    for length, contender, by in dict.fromkeys(keys):
        cells: list[list[tuple[int, float]]] = [[] for _ in range(5)]
        for _, _, _, block, blocks, samples, _, _, kept in table.where(length=length, contender=contender, by=by).rows:
            cells[0 if block == 1 else 1 + 4 * (block - 1) // blocks].append((samples, kept))
        counts = [sum(samples for samples, _ in cell) for cell in cells]
        means = [sum(samples * kept for samples, kept in cell) for cell in cells]
        shown = [f"{mean / count:.0f} ({count})" if count else "" for mean, count in zip(means, counts, strict=True)]
        rows.append((length, contender, by, *shown))
    titles = ("tokens", "attention", "by", "block 1", "first quarter", "second", "third", "last")
    yield from _table(titles, rows, texts=3)


def _heads(table: Table) -> Iterator[str]:
    yield (
        "\n## Attention mass lost\n\nPercent of dense attention's mass that the mask hides in blocks after the first: "
        f"by layer, and of the {TOP_HEADS} heads that look across blocks most, layer.head (heads.csv, "
        "lost_by_block.csv, heads.png). In prefill nobody reads what the last layer gives.\n"
    )
    layers = sorted(set(table.column("layer")))
    rows = []
    for length, contender in dict.fromkeys(zip(table.column("length"), table.column("contender"), strict=True)):
        mine = table.where(length=length, contender=contender)
        by_layer = [f"{lost:.1f}" for lost in mine.means("layer", "lost").values()]
        top = ", ".join(f"{layer}.{head}: {lost:.0f}" for _, _, layer, head, lost in mine.rows[:TOP_HEADS] if lost > 0)
        rows.append((length, contender, top, *by_layer))
    yield from _table(("tokens", "attention", "heads", *(f"layer {layer}" for layer in layers)), rows, texts=3)


def _first_tokens(table: Table) -> Iterator[str]:
    yield (
        "\n## First tokens\n\nAttention on the first token of a block after the first, from tokens later in it, "
        "against that on the next ones, means over layers and heads; and on the first token of the context. "
        "arXiv 2411.17116, section 2.1, explains the anchor by the sink that a block has at its start without one "
        "(first_tokens.csv, first_tokens.png).\n"
    )
    rows = []
    keys = zip(*(table.column(name) for name in ("length", "contender", "variant")), strict=True)
    for length, contender, variant in dict.fromkeys(keys):
        mine = table.where(length=length, contender=contender, variant=variant)
        mass = list(mine.where(where="block").means("token", "mass").values())
        start = mine.where(where="start").means("token", "mass")[1]
        others = statistics.fmean(mass[1:])
        times = f"{mass[0] / others:.1f}" if others else ""
        rows.append((length, contender, variant, f"{mass[0]:.2g}", f"{others:.2g}", times, f"{start:.2g}"))
    yield from _table(
        ("tokens", "attention", "run", "block's first", f"its next {FIRST_TOKENS - 1}", "times", "context's first"),
        rows,
        texts=3,
    )


def _scores(lines: Mapping[Key, Line], scores: Scores) -> Iterator[str]:
    yield (
        "\n## Against task scores\n\nSpearman's rank correlation: over the means of methods at a length (dense "
        "attention among them) with their scores; and over single samples with what they score less than dense "
        "attention (scores.csv, scores.png).\n"
    )
    shown = [
        (name, *("" if value is None else f"{value:.2f}" for value in values))
        for name, *values in correlations(lines, scores)
    ]
    yield from _table(("measure", "methods", "samples"), shown, texts=1)
    losses = largest_losses(lines, scores)
    if losses:
        yield "\nPoints below dense attention, and answers of 100 that change:\n"
        rows = [(length, contender, f"{lost:.1f}", f"{most:.1f}") for contender, length, lost, most in losses]
        yield from _table(("tokens", "attention", "points lost", "answers changed"), rows, texts=2)
