"""The planner against rows of tools/benchmark.py: the same runs, planned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from nemo_star.config.compare import Candidate
from nemo_star.config.plan import PlanConfig
from nemo_star.config.strict import parse
from nemo_star.methods.config import AttentionConfig
from nemo_star.parallel.experts import check_experts
from nemo_star.parallel.layout import Layout, check_layout
from nemo_star.planning.memory import max_kv
from nemo_star.planning.plan import Row, row_of, workload
from nemo_star.planning.time import Clock

COMPARED = {
    "prefill_seconds": float,
    "decode_seconds_per_token": float,
    "peak_memory_bytes": float,
    "prefill_flops": int,
    "kv_bytes_per_rank": int,
}
"""What a row measures (three) or counts (two), and is compared."""
_LAYOUT = ("context_tokens", "block_size", "anchor_size", "tp", "pp", "cp")


def compare_rows(config: PlanConfig) -> list[dict[str, Any]]:
    """For each row of the file `config.check` of a method that is planned: the keys that name it, and for each of
    COMPARED the planned and the measured value.

    Raises:
        ValueError: the file holds no rows of tools/benchmark.py, or rows of another model.
    """
    path = Path(str(config.check))
    try:
        rows = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"check={path} is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"check={path} holds no list of rows of tools/benchmark.py")
    compared = [
        _compared(row, number, candidate, config)
        for number, row in enumerate(rows, start=1)
        if (candidate := _candidate(row)) is not None
    ]
    if not compared:
        raise ValueError(f"check={path} holds no row of an attention method that can be planned")
    return compared


def _candidate(row: Row) -> Candidate | None:
    """The word of `compare` that a row measured; None for what cannot be planned (transformers) or was withheld."""
    if row.get("withheld") is not None:
        return None
    attention, anchor = row.get("attention"), row.get("anchor")
    try:
        return Candidate.parse(f"{attention}:{anchor}" if anchor else str(attention))
    except ValueError:
        return None


def _compared(row: Row, number: int, candidate: Candidate, config: PlanConfig) -> dict[str, Any]:
    wrong = [name for name in (*_LAYOUT, *COMPARED) if not isinstance(row.get(name), int | float)]
    if wrong:
        raise ValueError(f"check={config.check}: row {number} lacks {', '.join(wrong)}")
    layout = Layout(tp=row["tp"], cp=row["cp"], dp=1, pp=row["pp"])
    sizes: Row = {name: row[name] for name in ("block_size", "anchor_size", "overlap_size") if name in row}
    run = dataclasses.replace(
        config,
        context_tokens=row["context_tokens"],
        attention=parse(AttentionConfig, sizes, prefix=f"row {number}: "),
        parallel=dataclasses.replace(config.parallel, decode=row.get("decode") or "replicated"),
    )
    work = workload(candidate, run, config.model, layout)
    check_layout(config.model, layout, work.method)
    check_experts(config.model, layout)
    row_planned = row_of(candidate.word, work, Clock(config.machine, config.efficiency))
    planned = {**row_planned, "kv_bytes_per_rank": max_kv(work)}
    if planned["prefill_flops"] != row["prefill_flops"]:
        raise ValueError(
            f"check={config.check}: row {number} counts {row['prefill_flops']} FLOPs in its prefill, the model given "
            f"here takes {planned['prefill_flops']}: give the model= and model.KEY=VALUE of the benchmark"
        )
    names = {name: row.get(name) for name in ("kind", "decode", *_LAYOUT)}
    return {**names, **{name: {"planned": planned[name], "measured": row[name]} for name in COMPARED}}
