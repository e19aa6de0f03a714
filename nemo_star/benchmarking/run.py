"""`tools/benchmark.py`: attention methods on the same random weights, in turn in one process, so that ratios hold."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from nemo_star.benchmarking.contenders import ALONE, Contender, OnEngine, build_contenders, counted
from nemo_star.benchmarking.fit import shortage
from nemo_star.benchmarking.report import check_plots, draw, table
from nemo_star.config.benchmark import BenchmarkConfig
from nemo_star.kernels.stored import stored_name
from nemo_star.models.sequence_parallel import check_sequence_parallel
from nemo_star.parallel.groups import barrier, create_groups, gather_objects, initialize, on_first_rank
from nemo_star.parallel.layout import Layout, plan_layout
from nemo_star.runtime.files import check_target, write_whole
from nemo_star.runtime.launch import environment_world_size
from nemo_star.runtime.machine import machine
from nemo_star.runtime.memory import FreeMemory, free_memory
from nemo_star.runtime.watchdog import Watchdog, watchdog_of_this_job

START_UP_TOKENS = 256
FIRST_ROUND = ("prefill_seconds", "first_token_seconds", "decode_seconds_per_token")
"""What a row also has of its first round."""


def run(config: BenchmarkConfig, free_memory: Callable[[torch.device], FreeMemory] = free_memory) -> int:
    """Measure all candidates at all context lengths, and after each length print its part of the table and write the
    rows so far: what comes early outlives what dies later. In the end draw the plots.

    Args:
        free_memory: what a rank's device has left; a candidate is not run at a length that does not fit by the plan.
    """
    layout = plan_layout(config.parallel, None, world_size=environment_world_size())
    if layout.dp > 1:
        raise ValueError(f"the benchmark runs one replica; this layout has {layout.dp}: start fewer processes")
    check_target("output", config.output, replace=config.overwrite)
    check_plots(config.plot)
    with watchdog_of_this_job(config.parallel.timeout_minutes) as watchdog:
        device = initialize()
        check_sequence_parallel(config.parallel.sequence_parallel, layout, device.type)
        contenders = _build(config, layout, watchdog)
        free = gather_objects(free_memory(device))  # beside the weights
        _start_up(contenders, config, watchdog)
        rows: list[dict[str, Any]] = []
        for tokens in tqdm(config.context_tokens, desc="contexts", disable=dist.get_rank() > 0):
            new = _rows(contenders, tokens, config, watchdog, free)
            if dist.get_rank() == 0:
                tqdm.write(table(new, titles=not rows))
            rows += new
            on_first_rank(functools.partial(_write, config, rows))
    measured = [row for row in rows if row["withheld"] is None]
    if config.plot is not None and measured:
        folder = Path(config.plot)
        on_first_rank(lambda: draw(measured, folder))
    return 0


def _build(config: BenchmarkConfig, layout: Layout, watchdog: Watchdog) -> list[Contender]:
    """All candidates with their weights, their layers watched."""
    groups = create_groups(layout, cp_max_ctas=config.parallel.context_parallel_max_ctas)
    alone = create_groups(dataclasses.replace(ALONE, dp=environment_world_size()))
    with watchdog.suspended("drawing weights"):
        contenders = build_contenders(config, config.model, (layout, groups), alone)
    for contender in contenders:
        if isinstance(contender, OnEngine) and contender.engine:
            watchdog.watch_layers(contender.engine.stage.model.decoder.layers, contender.engine.device)
    return contenders


def _rows(
    contenders: Sequence[Contender],
    tokens: int,
    config: BenchmarkConfig,
    watchdog: Watchdog,
    free: Sequence[FreeMemory],
) -> list[dict[str, Any]]:
    """A row of each candidate at one context length; one that does not fit has `withheld`, the reason, and no times."""
    reasons = [shortage(contender, config.model, tokens, free) for contender in contenders]
    fitting = [contender for contender, reason in zip(contenders, reasons, strict=True) if reason is None]
    samples = iter(_measure(fitting, tokens, config, watchdog))
    rows, where = [], machine()
    for contender, reason in zip(contenders, reasons, strict=True):
        row = {**_named(contender, tokens), "withheld": reason}
        if reason is None:
            row |= counted(contender, config.model, tokens) | _medians(next(samples))
        rows.append(row | where)
    return rows


def _measure(
    contenders: Sequence[Contender], tokens: int, config: BenchmarkConfig, watchdog: Watchdog
) -> list[list[dict[str, Any]]]:
    """Samples of each candidate at one context length: rounds of all in turn, there and back, some to warm up first.

    Those have a token more: libraries that make a plan for each length (cuDNN) have none yet for the one that counts,
    as with a user's context. A sample is the slowest (largest) rank's.
    """
    samples: list[list[dict[str, Any]]] = [[] for _ in contenders]
    for turn in range(config.warm_up_rounds + config.repeats):
        warms_up = turn < config.warm_up_rounds
        context = _context(tokens + warms_up, config)
        for number in list(range(len(contenders)))[:: -1 if turn % 2 else 1]:
            contender = contenders[number]
            sample = _sample(contender, context, config, watchdog)
            if not warms_up:
                samples[number].append(sample)
    return samples


def _context(tokens: int, config: BenchmarkConfig) -> list[int]:
    return [(i * i + 7) % config.model.vocab_size for i in range(tokens)]


def _sample(contender: Contender, context: list[int], config: BenchmarkConfig, watchdog: Watchdog) -> dict[str, Any]:
    barrier()
    # transformers' layers make no steps that the watchdog knows.
    own_pace = not isinstance(contender, OnEngine)
    with watchdog.suspended(contender.candidate.word) if own_pace else nullcontext():
        sample = contender.sample(context, config.decode_tokens)
    reports = [report for report in gather_objects(sample) if report is not None]
    return {key: max(report[key] for report in reports) for key in reports[0]}


def _start_up(contenders: Sequence[Contender], config: BenchmarkConfig, watchdog: Watchdog) -> None:
    """Run each candidate once, on a short context: libraries are loaded and communicators made, which the first would
    pay for all where no rounds warm up. One whose sizes do not go with so short a context is left as it is."""
    tokens = min(START_UP_TOKENS, -(-min(config.context_tokens) // 2))
    for contender in contenders:
        try:
            contender.method.sizes(tokens)
        except ValueError:
            continue
        _sample(contender, _context(tokens, config), config, watchdog)


def _named(contender: Contender, tokens: int) -> dict[str, Any]:
    candidate, method, layout = contender.candidate, contender.method, contender.layout
    return {
        "kind": candidate.word,
        "attention": candidate.kind,
        "anchor": method.variant,
        "decode": "sharded" if contender.sliced else "replicated",
        "cache_dtype": stored_name(contender.cache_dtype or contender.dtype),
        "context_tokens": tokens,
        "tp": layout.tp,
        "pp": layout.pp,
        "cp": layout.cp,
    }


def _medians(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of all rounds, and the times of the first one, which meets its length for the first time."""
    medians = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
    first = {key: samples[0][key] for key in FIRST_ROUND if key in samples[0]}
    return {**medians, "first_round": first, "repeats": len(samples)}


def _write(config: BenchmarkConfig, rows: Sequence[dict[str, Any]]) -> None:
    if config.output is not None:
        write_whole(Path(config.output), lambda file: file.write_text(json.dumps(rows, indent=2) + "\n"))
