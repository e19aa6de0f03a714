"""`tools/plan.py`: tables for a person on standard output, rows for a program in a file."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_star.config.plan import PlanConfig
from nemo_star.planning.measured import compare_rows
from nemo_star.planning.plan import Row, block_rows, fastest, plan_rows, shared_layout
from nemo_star.planning.published import Cell, median_error, published_cells
from nemo_star.runtime.files import check_target, write_whole

GIB = 2**30
MEASURED = {"prefill_seconds": "prefill s", "decode_seconds_per_token": "decode s", "peak_memory_bytes": "peak bytes"}


def run(config: PlanConfig) -> int:
    """Print what `config` asks for, write it where it asks for a file; returns the exit code."""
    check_target("output", config.output, replace=config.overwrite)
    content: Any
    if config.validate:
        cells = published_cells(config.efficiency)
        text = cells_table(cells)
        content = [{**dataclasses.asdict(cell), "error": cell.error} for cell in cells]
    elif config.check is not None:
        content = compare_rows(config)
        text = measured_table(content)
    else:
        rows, blocks = plan_rows(config), block_rows(config)
        text = plan_table(config, rows, blocks)
        content = {"rows": rows, "blocks": blocks}
    print(text)
    if config.output is not None:
        write_whole(Path(config.output), lambda file: file.write_text(json.dumps(content, indent=2) + "\n"))
    return 0


def plan_table(config: PlanConfig, rows: Sequence[Row], blocks: Sequence[Row]) -> str:
    """Attention methods, which is fastest, and block sizes."""
    layout, machine = shared_layout(config), config.machine
    usable = machine.memory_bytes * config.efficiency.usable_memory / GIB
    lines = [
        f"{config.context_tokens:,} context tokens on {config.world_size} ranks of {machine.name}: tp {layout.tp}, "
        f"pp {layout.pp}, cp {layout.cp}; a rank may fill {usable:.1f} GiB",
        "",
        f"{'kind':<15} {'block':>10} {'ranks':>6} {_TITLES}",
    ]
    for row in rows:
        if row["error"] is not None:
            lines.append(f"{row['kind']:<15} does not run: {row['error']}")
            continue
        block = f"{row['block_size']:,}" if row["block_size"] < row["context_tokens"] else "-"
        lines.append(f"{row['kind']:<15} {block:>10} {row['tp'] * row['pp'] * row['cp']:>6} {_numbers(row)}")
    best = fastest(list(rows))
    lines += ["", f"fastest that fits: {best['kind']}" if best else f"nothing fits: {_ways(layout.cp)}"]
    return "\n".join([*lines, *_block_lines(config, blocks, layout.cp)])


def _block_lines(config: PlanConfig, blocks: Sequence[Row], cp: int) -> list[str]:
    """Other block sizes of the method that has blocks, and which to take."""
    if not blocks:
        return []
    overlap = max(row["overlap_size"] for row in blocks)
    about = f"anchor = block, overlap of {overlap:,}" if overlap else "anchor = block"
    lines = ["", f"{blocks[0]['kind']} with other blocks ({about}):"]
    lines.append(f"{'':<15} {'block':>10} {'blocks':>6} {_TITLES}")
    for row in blocks:
        count = -(-row["context_tokens"] // row["block_size"])
        mark = "advised" if row["advised"] else ""
        lines.append(f"{mark:<15} {row['block_size']:>10,} {count:>6} {_numbers(row)}")
    return [*lines, "", _advice(config, blocks, cp)]


_TITLES = f"{'prefill s':>10} {'decode ms':>9} {'weights':>8} {'K/V':>8} {'activ.':>8} {'peak GiB':>8}  {'fits':<4}"


def _numbers(row: Row) -> str:
    sizes = [
        row[name] / GIB
        for name in ("weight_bytes_per_rank", "kv_bytes_per_rank", "activation_bytes_per_rank", "peak_memory_bytes")
    ]
    times = f"{row['prefill_seconds']:>10.3f} {row['decode_seconds_per_token'] * 1e3:>9.2f}"
    return f"{times} {' '.join(f'{size:>8.2f}' for size in sizes)}  {'yes' if row['fits'] else 'no'}"


def _advice(config: PlanConfig, blocks: Sequence[Row], cp: int) -> str:
    advised = next((row for row in blocks if row["advised"]), None)
    if advised is None:
        return f"no block size fits: {_ways(cp)}"
    size = advised["block_size"]
    share = f"1/{config.context_tokens / size:.3g} of the context"
    quarter = (
        "the share at which the paper measured accuracy"
        if 4 * size >= config.context_tokens
        else "accuracy may be lower than at the paper's quarter"
    )
    idle = max(0, cp - -(-config.context_tokens // size))
    ranks = f"{idle} of {cp} context-parallel ranks stay without one" if idle else "every rank has one"
    return f"attention.block_size={size}: {share} ({quarter}), {ranks}"


def _ways(cp: int) -> str:
    return (
        f"more ranks (context parallel: {cp} now), tensor or pipeline parallelism, a smaller dtype or block, "
        "or a machine with more memory"
    )


def cells_table(cells: Sequence[Cell]) -> str:
    """Published against predicted, as a Markdown table."""
    lines = ["| source | what | context | published | predicted | error |", "|---|---|---:|---:|---:|---:|"]
    for cell in cells:
        values = " | ".join(f"{value:.2f}" for value in (cell.published, cell.predicted))
        lines.append(f"| {cell.source} | {cell.what} | {cell.context_tokens:,} | {values} | {cell.error:+.1%} |")
    prefill = [cell for cell in cells if cell.source == cells[0].source]
    return "\n".join(
        [
            *lines,
            "",
            f"Median absolute error: {median_error(list(cells)):.1%} over all {len(cells)} cells, "
            f"{median_error(prefill):.1%} over the {len(prefill)} of {cells[0].source}.",
        ]
    )


def measured_table(rows: Sequence[dict[str, Any]]) -> str:
    """Planned against measured by tools/benchmark.py, as a Markdown table."""
    lines = [
        "| kind | context | tp, pp, cp | "
        + " | ".join(f"{title}: planned | measured" for title in MEASURED.values())
        + " |",
        "|---|---:|---|" + "---:|---:|" * len(MEASURED),
    ]
    for row in rows:
        pairs = [f"{_short(row[name]['planned'])} | {_short(row[name]['measured'])}" for name in MEASURED]
        where = f"{row['tp']}, {row['pp']}, {row['cp']}"
        lines.append(f"| {row['kind']} | {row['context_tokens']:,} | {where} | {' | '.join(pairs)} |")
    errors = {
        title: statistics.median(abs(row[name]["planned"] / row[name]["measured"] - 1) for row in rows)
        for name, title in MEASURED.items()
    }
    medians = ", ".join(f"{title} {error:.0%}" for title, error in errors.items())
    same = sum(row["kv_bytes_per_rank"]["planned"] == row["kv_bytes_per_rank"]["measured"] for row in rows)
    return "\n".join([*lines, "", f"Median absolute error: {medians}. K/V bytes agree in {same} of {len(rows)} rows."])


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
