"""Pictures of a fidelity report; none without matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_star.evaluation.fidelity.tables import Table
from nemo_star.runtime.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = {"dense": "k:", "anchor": "C0o-", "no anchor": "C3s-"}
_RUNS = {"dense": "dense", "anchor": "with anchor", "no anchor": "without anchor"}


def draw(tables: Mapping[str, Table], folder: Path) -> None:
    """A PNG for each table that is better seen than read; of the longest length."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    length = max(tables["positions"].column("length"))
    of_length = {name: table.where(length=length) for name, table in tables.items()}
    pictures = {"positions": _positions, "heads": _heads, "first_tokens": _first_tokens, "scores": _scores}
    for name, picture in pictures.items():
        if name in tables:
            figure = picture(of_length[name])
            figure.suptitle(f"{length} tokens", fontsize=10)
            file = folder / f"{name}.png"
            write_whole(file, lambda target, figure=figure: figure.savefig(target, format="png", dpi=120))  # type: ignore[misc]


def _figure(columns: int, rows: int = 1, *, width: float = 4.0, height: float = 3.2) -> tuple[Figure, Any]:
    """A figure, and its axes [rows, columns]."""
    from matplotlib.figure import Figure  # no pyplot: no windows, no state

    figure = Figure(figsize=(width * columns, height * rows + 0.3), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _contenders(table: Table) -> list[str]:
    return list(dict.fromkeys(table.column("contender")))


def _positions(table: Table) -> Figure:
    """KL and agreement by place, in the query and in the answer."""
    parts = [part for part in ("query", "answer") if part in table.column("part")]
    figure, axes = _figure(len(parts), 2)
    for column, part in enumerate(parts):
        for contender in _contenders(table):
            mine = table.where(contender=contender, part=part)
            places = mine.column("position")
            axes[0, column].plot(places, [max(kl, 1e-12) for kl in mine.column("kl")], ".-", label=contender)
            axes[1, column].plot(places, mine.column("agreement"), ".-")
        axes[0, column].set(yscale="log", ylabel="KL(dense || method), nats")
        axes[1, column].set(ylim=(0, 103), ylabel="top-1 agreement, of 100", xlabel=f"token of the {part}")
    axes[0, 0].legend(fontsize=7)
    return figure


def _heads(table: Table) -> Figure:
    """Lost mass, a map of layers and heads for each method."""
    contenders = _contenders(table)
    figure, axes = _figure(len(contenders), width=2.8)
    for axis, contender in zip(axes[0], contenders, strict=True):
        rows = table.where(contender=contender).rows
        lost = [[0.0] * max(row[3] for row in rows) for _ in range(max(row[2] for row in rows))]
        for _, _, layer, head, value in rows:
            lost[layer - 1][head - 1] = value
        extent = (0.5, len(lost[0]) + 0.5, len(lost) + 0.5, 0.5)
        image = axis.imshow(lost, vmin=0, vmax=100, cmap="viridis", aspect="auto", extent=extent)
        axis.set_title(contender, fontsize=9)
        axis.set(xlabel="head", ylabel="layer")
        for one in (axis.xaxis, axis.yaxis):
            one.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes[0, -1], label="lost mass, percent")
    return figure


def _first_tokens(table: Table) -> Figure:
    """Attention on the first tokens of a block, and of the context, by run; of methods with an anchor, if there are."""
    contenders = _contenders(table.where(variant="anchor")) or _contenders(table)
    figure, axes = _figure(len(contenders), 2, width=3.2, height=2.8)
    places = {"block": "token of the block", "start": "token of the context (the anchor)"}
    for column, contender in enumerate(contenders):
        for row, (where, title) in enumerate(places.items()):
            axis = axes[row, column]
            for variant, line in _LINES.items():
                mass = table.where(contender=contender, variant=variant, where=where).means("token", "mass")
                if any(mass.values()):  # what is not seen has no place on a logarithmic scale
                    label = _RUNS[variant]
                    axis.plot(list(mass), list(mass.values()), line, markersize=3, linewidth=1, label=label)
            axis.set(yscale="log", xlabel=title)
        axes[0, column].set_title(contender, fontsize=9)
    axes[0, 0].legend(fontsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("attention, mean of heads")
    return figure


def _scores(table: Table) -> Figure:
    """Scores against each measure."""
    measures = table.titles[table.titles.index("score") + 1 :]
    figure, axes = _figure(len(measures), width=3.2)
    for axis, measure in zip(axes[0], measures, strict=True):
        for number, contender in enumerate(_contenders(table)):
            mine = table.where(contender=contender)
            axis.plot(mine.column(measure), mine.column("score"), "osD^v"[number % 5], label=contender)
        axis.set(xlabel=measure)
    axes[0, 0].set_ylabel("score")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return figure
