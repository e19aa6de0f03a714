"""`tools/benchmark.py`: kinds of attention on the same random weights, in turn in one process, so that ratios hold."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from nemo_star.attention import AttentionState
from nemo_star.attention.kernels import get_kernel
from nemo_star.cache import KVCache
from nemo_star.config import AttentionConfig, BenchmarkConfig
from nemo_star.distributed import Groups, Layout, create_groups, gather_objects, initialize, on_first_rank, plan_layout
from nemo_star.engine import Engine
from nemo_star.flops import prefill_flops
from nemo_star.launch import environment_world_size
from nemo_star.machine import machine
from nemo_star.memory import peak_memory_bytes, reset_peak_memory
from nemo_star.model import ModelConfig, build_model, build_rotary, check_layout
from nemo_star.pipeline import Stage
from nemo_star.sequence_parallel import check_sequence_parallel
from nemo_star.targets import check_target, write_whole


@dataclasses.dataclass
class Contender:
    """One kind to measure: its engine on the ranks that take part."""

    kind: str
    attention: AttentionConfig
    engine: Engine | None
    """None on a rank that only waits (dense runs on rank 0)."""
    layout: Layout


def run(config: BenchmarkConfig) -> int:
    """Measure all kinds at all context lengths; print the table, write the rows."""
    on_all = dataclasses.replace(config.attention, kind="star")
    layout = plan_layout(config.parallel, kind=on_all.kind, world_size=environment_world_size())
    if layout.dp > 1:
        raise ValueError(f"the benchmark runs one replica; this layout has {layout.dp}: start fewer processes")
    check_target("output", config.output, replace=config.overwrite)
    device = initialize(config.parallel.timeout_minutes)
    check_sequence_parallel(config.parallel.sequence_parallel, layout, device.type)
    model = ModelConfig(
        **dataclasses.asdict(config.model),
        kv_channels=config.model.hidden_size // config.model.num_attention_heads,
        max_position_embeddings=max(config.context_tokens) + config.decode_tokens + 1,
    )
    groups = create_groups(layout, config.parallel.timeout_minutes)
    alone = create_groups(Layout(tp=1, cp=1, dp=environment_world_size(), pp=1), config.parallel.timeout_minutes)
    contenders = [_contender(kind, config, model, (layout, groups), alone) for kind in config.compare]
    rows = []
    for tokens in tqdm(config.context_tokens, desc="contexts", disable=dist.get_rank() > 0):
        rows += _measure(contenders, tokens, config, model)
    if dist.get_rank() == 0:
        print(table(rows))
    on_first_rank(lambda: _write(config.output, rows))
    return 0


def _contender(
    kind: str, config: BenchmarkConfig, model: ModelConfig, shared: tuple[Layout, Groups], alone: Groups
) -> Contender:
    """The engine of one kind, with the same random weights for all (drawn from one seed for each parameter)."""
    name, _, anchor = kind.partition(":")
    changes: dict[str, Any] = {"kind": name, "anchor": anchor or config.attention.anchor}
    attention = dataclasses.replace(config.attention, **changes)
    layout, groups = (Layout(1, 1, 1, 1), alone) if name == "dense" else shared
    if name == "dense" and dist.get_rank() > 0:
        return Contender(kind, attention, None, layout)
    check_layout(model, layout, name)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = getattr(torch, config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    kernel = get_kernel(attention.kernel, device, dtype)
    state = AttentionState(KVCache(dtype), kernel, kernel, groups.cp)
    built = build_model(model, kind=name, state=state, groups=groups.collection, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    for weight in built.parameters():
        values = torch.randn(weight.shape, generator=generator) * 0.02 + (1.0 if weight.dim() == 1 else 0.0)
        weight.data.copy_(values)
    sequence_parallel = config.parallel.sequence_parallel and layout.tp > 1  # dense runs on one rank
    rotary = build_rotary(model, device)
    stage = Stage(built, rotary, groups.pp, model.vocab_size, sequence_parallel=sequence_parallel)
    return Contender(kind, attention, Engine(stage, state, groups, attention), layout)


def _measure(
    contenders: Sequence[Contender], tokens: int, config: BenchmarkConfig, model: ModelConfig
) -> list[dict[str, Any]]:
    """Rows of one context length: one round to warm up, then `repeats` rounds of all kinds in turn."""
    samples: dict[str, list[dict[str, Any]]] = {contender.kind: [] for contender in contenders}
    for turn in range(config.repeats + 1):
        for contender in contenders:
            dist.barrier()
            sample = _sample(contender, tokens, config) if contender.engine else None
            reports = [report for report in gather_objects(sample) if report is not None]
            if turn:
                samples[contender.kind].append({key: max(report[key] for report in reports) for key in reports[0]})
    return [_row(contender, samples[contender.kind], tokens, model) for contender in contenders]


def _sample(contender: Contender, tokens: int, config: BenchmarkConfig) -> dict[str, Any]:
    """One prefill and decode on this rank; the slowest rank's times count."""
    engine = contender.engine
    assert engine is not None
    threads = torch.get_num_threads()
    if contender.attention.kind == "dense" and engine.device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    reset_peak_memory(engine.device)
    context = [(i * i + 7) % config.model.vocab_size for i in range(tokens)]
    engine.encode_context(context, new_tokens=config.decode_tokens + 1)
    prefill = engine.prefill_report()
    kv_bytes = engine.state.cache.bytes_per_token * engine.state.cache.tokens
    marks = []
    for _ in engine.generate(
        [1], tokens_to_generate=config.decode_tokens + 1, choose=lambda logits: (int(logits.argmax()), False)
    ):
        marks.append(time.perf_counter())
    torch.set_num_threads(threads)
    steps = [after - before for before, after in itertools.pairwise(marks)]
    return {
        "prefill_seconds": prefill.seconds,
        "decode_seconds_per_token": statistics.median(steps),
        "kv_bytes_per_rank": kv_bytes,
        "peak_memory_bytes": peak_memory_bytes(engine.device),
    }


def _row(contender: Contender, samples: list[dict[str, Any]], tokens: int, model: ModelConfig) -> dict[str, Any]:
    attention, layout = contender.attention, contender.layout
    block_size, anchor_size = attention.sizes(tokens)
    partition = contender.engine.partition(tokens) if contender.engine else None
    return {
        "kind": contender.kind,
        "attention": attention.kind,
        "anchor": attention.anchor if attention.kind == "star" else None,
        "decode": "replicated",
        "context_tokens": tokens,
        "block_size": block_size,
        "anchor_size": anchor_size,
        "tp": layout.tp,
        "pp": layout.pp,
        "cp": layout.cp,
        **{key: statistics.median(sample[key] for sample in samples) for key in samples[0]},
        "prefill_flops": prefill_flops(model, partition, attention) if partition else None,
        "repeats": len(samples),
        **machine(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows for a person: times, and for each the ratio of times and of FLOPs over the first kind at that length."""
    titles = ("prefill s", 10), ("time x", 7), ("FLOP x", 7), ("decode ms", 10), ("peak MiB", 9)
    lines = [f"{'context':>9} {'kind':<16} " + " ".join(f"{title:>{width}}" for title, width in titles)]
    first: dict[int, dict[str, Any]] = {}
    for row in rows:
        base = first.setdefault(row["context_tokens"], row)
        lines.append(
            f"{row['context_tokens']:>9} {row['kind']:<16} {row['prefill_seconds']:>10.3f} "
            f"{row['prefill_seconds'] / base['prefill_seconds']:>7.2f} "
            f"{row['prefill_flops'] / base['prefill_flops']:>7.2f} "
            f"{row['decode_seconds_per_token'] * 1e3:>10.2f} {row['peak_memory_bytes'] / 2**20:>9.0f}"
        )
    return "\n".join(lines)


def _write(output: str | None, rows: Sequence[dict[str, Any]]) -> None:
    if output is not None:
        write_whole(Path(output), lambda file: file.write_text(json.dumps(rows, indent=2) + "\n"))
