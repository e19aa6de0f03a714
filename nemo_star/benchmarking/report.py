"""Rows of a benchmark for a person: a table and pictures."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_star.runtime.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
_COLUMNS = (
    ("prefill s", 10),
    ("time x", 7),
    ("FLOP x", 7),
    ("decode ms", 10),
    ("time x", 7),
    ("byte x", 7),
    ("KV read x", 9),
    ("1st token", 9),
    ("peak MiB", 9),
)


def table(rows: Sequence[Row], *, titles: bool = True) -> str:
    """Times, and for each the ratio of times and of what was counted over the first candidate that ran at that length.

    `FLOP x`: operations of prefill, all ranks'. `byte x`: weights that a rank reads for a token. `KV read x`: a token's
    attention over a plain read of the same K/V. `1st token`: ms, in the first round. A row withheld says why.
    """
    width = max(16, *(len(row["kind"]) for row in rows))
    head = f"{'context':>9} {'kind':<{width}} " + " ".join(f"{title:>{size}}" for title, size in _COLUMNS)
    lines = [head] if titles else []
    first: dict[int, Row] = {}
    for row in rows:
        start = f"{row['context_tokens']:>9} {row['kind']:<{width}}"
        if row["withheld"] is not None:
            lines.append(f"{start} withheld: {row['withheld']}")
            continue
        base = first.setdefault(row["context_tokens"], row)
        cells = (
            f"{row['prefill_seconds']:.3f}",
            _over(row, base, "prefill_seconds"),
            _over(row, base, "prefill_flops"),
            f"{row['decode_seconds_per_token'] * 1e3:.2f}",
            _over(row, base, "decode_seconds_per_token"),
            _over(row, base, "decode_weight_bytes"),
            _ratio(row.get("decode_attention_seconds"), row.get("kv_read_seconds")),
            _milliseconds(row["first_round"].get("first_token_seconds")),
            f"{row['peak_memory_bytes'] / 2**20:.0f}",
        )
        padded = " ".join(f"{cell:>{size}}" for cell, (_, size) in zip(cells, _COLUMNS, strict=True))
        lines.append(f"{start} {padded}")
    return "\n".join(lines)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _over(row: Row, base: Row, key: str) -> str:
    return _ratio(row[key], base[key])


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value is not None and base else "-"


def check_plots(folder: str | None) -> None:
    """Refuse, before anything runs, a folder that is not there or a machine that cannot draw.

    Raises:
        ValueError: says what is missing.
    """
    if folder is None:
        return
    if not Path(folder).is_dir():
        raise ValueError(f"plot={folder} is no directory: make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plot=DIR draws with matplotlib: pip install 'nemo-star[plot]'")


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """time.png and memory.png over the context's length, speedup.png at the longest; what was written."""
    from matplotlib.figure import Figure  # no pyplot: no windows, no state

    pictures = {"time.png": _draw_times, "memory.png": _draw_memory, "speedup.png": _draw_speedups}
    for name, picture in pictures.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        picture(rows, figure.add_subplot())
        _foot(rows, figure)
        write_whole(folder / name, functools.partial(figure.savefig, format="png", dpi=150))
    return [folder / name for name in pictures]


def _by_candidate(rows: Sequence[Row]) -> dict[str, list[Row]]:
    candidates: dict[str, list[Row]] = {}
    for row in rows:
        candidates.setdefault(row["kind"], []).append(row)
    return candidates


def _draw_times(rows: Sequence[Row], axes: Axes) -> None:
    for word, own in _by_candidate(rows).items():
        axes.plot([row["context_tokens"] for row in own], [row["prefill_seconds"] for row in own], "o-", label=word)
    axes.set(xlabel="context tokens", ylabel="prefill, seconds", xscale="log", yscale="log", title="Prefill time")
    _token_ticks(rows, axes)
    axes.legend()


def _draw_memory(rows: Sequence[Row], axes: Axes) -> None:
    for word, own in _by_candidate(rows).items():
        peaks = [row["peak_memory_bytes"] / 2**20 for row in own]
        axes.plot([row["context_tokens"] for row in own], peaks, "o-", label=word)
    axes.set(xlabel="context tokens", ylabel="peak memory of a rank, MiB", title="Peak memory")
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_speedups(rows: Sequence[Row], axes: Axes) -> None:
    """Bars at the longest context: times over those of the slowest, and the same of operations."""
    longest = max(row["context_tokens"] for row in rows)
    own = [row for row in rows if row["context_tokens"] == longest]
    for offset, key, label in ((-0.2, "prefill_seconds", "time"), (0.2, "prefill_flops", "operations")):
        most = max(row[key] for row in own)
        bars = axes.bar([i + offset for i in range(len(own))], [most / row[key] for row in own], 0.4, label=label)
        axes.bar_label(bars, fmt="%.1f")
    axes.set_xticks(range(len(own)), [row["kind"] for row in own], rotation=20, ha="right")
    axes.set(ylabel="times less than the most", title=f"Prefill of {longest:,} tokens")
    axes.legend()


def _token_ticks(rows: Sequence[Row], axes: Axes) -> None:
    from matplotlib.ticker import NullLocator

    tokens = sorted({row["context_tokens"] for row in rows})
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens], rotation=20)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _foot(rows: Sequence[Row], figure: Figure) -> None:
    row = rows[0]
    layout = f"tp {row['tp']}, pp {row['pp']}, cp {max(row['cp'] for row in rows)}"
    figure.supxlabel(f"{row['machine']}; commit {row['commit']}; {layout}", fontsize=7)
