"""`tools/benchmark.py`: attention methods on the same random weights, in turn in one process, so that ratios hold."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from nemo_star.benchmarking.contenders import ALONE, Contender, OnEngine, build_contenders, counted
from nemo_star.benchmarking.report import check_plots, draw, table
from nemo_star.config.benchmark import BenchmarkConfig
from nemo_star.config.model import ModelConfig
from nemo_star.models.sequence_parallel import check_sequence_parallel
from nemo_star.parallel.groups import create_groups, gather_objects, initialize, on_first_rank
from nemo_star.parallel.layout import Layout, plan_layout
from nemo_star.runtime.files import check_target, write_whole
from nemo_star.runtime.launch import environment_world_size
from nemo_star.runtime.machine import machine
from nemo_star.runtime.watchdog import Watchdog, watchdog_of_this_job


def run(config: BenchmarkConfig) -> int:
    """Measure all candidates at all context lengths; print the table, write the rows, draw the plots."""
    layout = plan_layout(config.parallel, None, world_size=environment_world_size())
    if layout.dp > 1:
        raise ValueError(f"the benchmark runs one replica; this layout has {layout.dp}: start fewer processes")
    check_target("output", config.output, replace=config.overwrite)
    check_plots(config.plot)
    with watchdog_of_this_job(config.parallel.timeout_minutes) as watchdog:
        device = initialize()
        check_sequence_parallel(config.parallel.sequence_parallel, layout, device.type)
        rows = _compare(config, layout, watchdog)
    if dist.get_rank() == 0:
        print(table(rows), flush=True)
    on_first_rank(lambda: _write(config, rows))
    return 0


def _compare(config: BenchmarkConfig, layout: Layout, watchdog: Watchdog) -> list[dict[str, Any]]:
    """Rows of all candidates at all context lengths."""
    model = config.model
    groups = create_groups(layout)
    alone = create_groups(dataclasses.replace(ALONE, dp=environment_world_size()))
    build = functools.partial(build_contenders, config, model, (layout, groups), alone)
    with watchdog.suspended("drawing weights"):
        contenders = build()
    for contender in contenders:
        if isinstance(contender, OnEngine) and contender.engine:
            watchdog.watch_layers(contender.engine.stage.model.decoder.layers)
    rows = []
    where = machine()
    for tokens in tqdm(config.context_tokens, desc="contexts", disable=dist.get_rank() > 0):
        samples = _measure(contenders, tokens, config, watchdog)
        rows += [
            _row(contender, taken, tokens, model) | where for contender, taken in zip(contenders, samples, strict=True)
        ]
    return rows


def _measure(
    contenders: Sequence[Contender], tokens: int, config: BenchmarkConfig, watchdog: Watchdog
) -> list[list[dict[str, Any]]]:
    """Samples of each candidate at one context length: rounds of all in turn, some to warm up first.

    A sample is the slowest (largest) rank's.
    """
    samples: list[list[dict[str, Any]]] = [[] for _ in contenders]
    context = [(i * i + 7) % config.model.vocab_size for i in range(tokens)]
    for turn in range(config.warm_up_rounds + config.repeats):
        for contender, taken in zip(contenders, samples, strict=True):
            dist.barrier()
            # transformers' layers make no steps that the watchdog knows.
            own_pace = not isinstance(contender, OnEngine)
            with watchdog.suspended(contender.candidate.word) if own_pace else nullcontext():
                sample = contender.sample(context, config.decode_tokens)
            reports = [report for report in gather_objects(sample) if report is not None]
            if turn >= config.warm_up_rounds:
                taken.append({key: max(report[key] for report in reports) for key in reports[0]})
    return samples


def _row(contender: Contender, samples: list[dict[str, Any]], tokens: int, model: ModelConfig) -> dict[str, Any]:
    candidate, method, layout = contender.candidate, contender.method, contender.layout
    return {
        "kind": candidate.word,
        "attention": candidate.kind,
        "anchor": method.variant,
        "decode": "sharded" if contender.sliced else "replicated",
        "context_tokens": tokens,
        "tp": layout.tp,
        "pp": layout.pp,
        "cp": layout.cp,
        **counted(contender, model, tokens),
        **{key: statistics.median(sample[key] for sample in samples) for key in samples[0]},
        "repeats": len(samples),
    }


def _write(config: BenchmarkConfig, rows: Sequence[dict[str, Any]]) -> None:
    if config.output is not None:
        write_whole(Path(config.output), lambda file: file.write_text(json.dumps(rows, indent=2) + "\n"))
    if config.plot is not None:
        draw(rows, Path(config.plot))
