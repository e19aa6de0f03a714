"""Memory and time for (model, context, layout, machine): a row for each attention method, and the block to take."""

from __future__ import annotations

import dataclasses
from typing import Any

from nemo_star.config.compare import Candidate
from nemo_star.config.model import ModelConfig
from nemo_star.config.plan import PlanConfig
from nemo_star.parallel.experts import check_experts
from nemo_star.parallel.layout import Layout, check_layout, plan_layout
from nemo_star.planning.memory import fullest_rank
from nemo_star.planning.time import Clock, decode_seconds, prefill_seconds
from nemo_star.planning.work import Workload

PAPER_SHARE = 4
"""The Star Attention paper's accuracy is measured at blocks of a quarter of the context (arXiv 2411.17116, table 1)."""
SMALLEST_BLOCK, LARGEST_BLOCK = 4096, 32768
"""The range of blocks there."""

Row = dict[str, Any]


def plan_rows(config: PlanConfig) -> list[Row]:
    """What each word of `config.compare` takes on the layout; what cannot run there says why.

    Raises:
        ValueError: sizes that do not go together whatever the method.
    """
    model = config.model
    layout = shared_layout(config)
    check_layout(model, layout, None)
    check_experts(model, layout)
    return [_row(candidate, config, model, layout) for candidate in config.candidates]


def shared_layout(config: PlanConfig) -> Layout:
    """The layout of the methods that share a context over ranks: one replica."""
    layout = plan_layout(config.parallel, None, world_size=config.world_size)
    if layout.dp > 1:
        raise ValueError(
            f"a plan is for one replica: world_size={config.world_size} leaves {layout.dp} of "
            f"tp {layout.tp} * pp {layout.pp} * cp {layout.cp} = {layout.tp * layout.pp * layout.cp} ranks"
        )
    return layout


def workload(candidate: Candidate, config: PlanConfig, model: ModelConfig, layout: Layout) -> Workload:
    """The work of a word of `compare`; a method that cannot share a context runs on one cp rank."""
    method = candidate.method(config.attention, model)
    return Workload(
        model,
        layout if method.shares_context else dataclasses.replace(layout, cp=1),
        method,
        config.context_tokens,
        dtype=config.dtype or ("float32" if config.machine.device == "cpu" else "bfloat16"),
        cache_dtype=config.cache.dtype,
        decode=config.parallel.decode,
        device_type=config.machine.device,
    )


def row_of(word: str, work: Workload, clock: Clock) -> Row:
    """A row with the keys of tools/benchmark.py, and what they are made of."""
    memory = fullest_rank(work)
    block_size, anchor_size = work.method.sizes(work.context_tokens)
    peak = memory.peak + clock.machine.process_bytes
    return {
        "kind": word,
        "attention": work.method.kind,
        "anchor": work.method.variant,
        "decode": "sharded" if work.sliced else "replicated",
        "context_tokens": work.context_tokens,
        "block_size": block_size,
        "anchor_size": anchor_size,
        "overlap_size": work.method.pinned(work.context_tokens).overlap_size,
        "tp": work.layout.tp,
        "pp": work.layout.pp,
        "cp": work.layout.cp,
        "prefill_seconds": prefill_seconds(work, clock),
        "decode_seconds_per_token": decode_seconds(work, clock),
        "prefill_flops": work.flops,
        "weight_bytes_per_rank": memory.weights,
        "kv_bytes_per_rank": memory.kv,
        "activation_bytes_per_rank": memory.activations,
        "peak_memory_bytes": peak,
        "fits": peak <= usable_memory(work, clock),
        "machine": clock.machine.name,
        "error": None,
    }


def usable_memory(work: Workload, clock: Clock) -> float:
    """Bytes that a rank may fill."""
    return clock.machine.memory_bytes * clock.devices(work) * clock.efficiency.usable_memory


def fastest(rows: list[Row]) -> Row | None:
    """The row with the shortest prefill of those that run and fit."""
    fitting = [row for row in rows if row["error"] is None and row["fits"]]
    return min(fitting, key=lambda row: row["prefill_seconds"], default=None)


def block_rows(config: PlanConfig) -> list[Row]:
    """The first method of `compare` that has blocks, over block sizes (anchor = block), largest first; the one to take
    has `advised`. None of them has blocks: no rows.

    Advised is the largest block that leaves no rank without one, because accuracy grows with it; at most a quarter of
    the context and 32,768 tokens, at least 4,096 (the range of the paper's tables), and halved until it fits.
    """
    layout = shared_layout(config)
    candidate = next((c for c in config.candidates if c.method(config.attention, config.model).has_blocks), None)
    if candidate is None:
        return []
    word, work = candidate.word, workload(candidate, config, config.model, layout)
    clock = Clock(config.machine, config.efficiency)
    rows: dict[int, Row] = {}

    def row(size: int) -> Row:
        if size not in rows:
            rows[size] = row_of(word, work.resized(size), clock)
        return rows[size]

    advised = wanted = _advised_size(config.context_tokens, layout.cp)
    # A smaller block saves activations; where weights and K/V alone are too much, none helps.
    while not row(advised)["fits"] and advised > 1 and _bare(row(advised), clock) <= usable_memory(work, clock):
        advised //= 2
    largest = -(-config.context_tokens // PAPER_SHARE)
    for size in (largest, LARGEST_BLOCK, wanted * 4, wanted * 2, wanted // 2, wanted // 4):
        row(max(1, min(size, largest)))
    return [{**rows[size], "advised": size == advised and rows[size]["fits"]} for size in sorted(rows, reverse=True)]


def _bare(row: Row, clock: Clock) -> float:
    """Bytes of a row's rank without activations."""
    return row["weight_bytes_per_rank"] + row["kv_bytes_per_rank"] + clock.machine.process_bytes


def _advised_size(context_tokens: int, cp: int) -> int:
    largest = -(-context_tokens // PAPER_SHARE)
    return max(
        min(largest, LARGEST_BLOCK, -(-context_tokens // cp)),
        min(largest, SMALLEST_BLOCK),
    )


def _row(candidate: Candidate, config: PlanConfig, model: ModelConfig, layout: Layout) -> Row:
    work = workload(candidate, config, model, layout)
    try:
        check_layout(model, work.layout, work.method)
        check_experts(model, work.layout)
    except ValueError as error:
        return {"kind": candidate.word, "attention": work.method.kind, "fits": False, "error": str(error)}
    return row_of(candidate.word, work, Clock(config.machine, config.efficiency))
