"""`tools/generate.py`: a parsed recipe -> model on all ranks -> answers.

Rank 0 has a front desk that reads and checks requests and writes answers; all ranks run the engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_star.attention import AttentionState
from nemo_star.attention.cache import KVCache
from nemo_star.checkpoint.description import CheckpointDescription, read_description
from nemo_star.checkpoint.load import load_weights
from nemo_star.config.generate import GenerateConfig
from nemo_star.engine.engine import Engine
from nemo_star.kernels.registry import get_kernel
from nemo_star.models.build import build_model, build_rotary
from nemo_star.models.decode_sharding import install
from nemo_star.models.sequence_parallel import check_sequence_parallel
from nemo_star.models.stage import Stage
from nemo_star.parallel.decode_slices import sliced_parts
from nemo_star.parallel.groups import (
    Groups,
    create_groups,
    gather_objects,
    initialize,
    on_every_rank,
    on_first_rank,
)
from nemo_star.parallel.layout import Layout, check_layout, plan_layout
from nemo_star.planning.limit import MemoryLimit
from nemo_star.planning.work import Workload
from nemo_star.runtime.launch import environment_world_size
from nemo_star.runtime.memory import FreeMemory, free_memory, peak_memory_bytes
from nemo_star.runtime.watchdog import Watchdog, watchdog_of_this_job
from nemo_star.serving.answer import Result
from nemo_star.serving.frontdesk import FrontDesk
from nemo_star.serving.requests import Request


def run(config: GenerateConfig, free_memory: Callable[[torch.device], FreeMemory] = free_memory) -> int:
    """Answer everything that `config` asks for; returns the exit code.

    Args:
        free_memory: what a rank's device has left; a context that certainly does not fit is refused.

    Raises:
        ValueError, OSError: a user's error, on all ranks alike.
    """
    layout = plan_layout(config.parallel, kind=config.attention.kind, world_size=environment_world_size())
    with watchdog_of_this_job(config.parallel.timeout_minutes) as watchdog:
        device = initialize()
        check_sequence_parallel(config.parallel.sequence_parallel, layout, device.type)
        return _answer_all(config, layout, device, watchdog=watchdog, free=free_memory(device))


def _answer_all(
    config: GenerateConfig, layout: Layout, device: torch.device, *, watchdog: Watchdog, free: FreeMemory
) -> int:
    groups = create_groups(layout)
    description = on_first_rank(lambda: read_description(Path(str(config.checkpoint))))
    check_layout(description.model, layout, config.attention.kind)
    limit = MemoryLimit(
        Workload(
            description.model,
            layout,
            config.attention,
            context_tokens=0,
            dtype=dtype_name(config, device),
            cache_dtype=config.cache.dtype,
        ),
        gather_objects(free),
    )
    desk = FrontDesk(config, description.model, limit.check)
    on_every_rank(lambda: desk.load_tokenizer() if groups.replica.rank() == 0 else None)
    on_first_rank(watchdog.patient(desk.open, "reading requests"))
    build = functools.partial(build_engine, config, description, groups, device)
    engine = watchdog.patient(build, "loading the weights")()
    watchdog.follow(engine.stage.model.decoder.layers)
    on_first_rank(lambda: desk.start(engine.describe(), cp_size=layout.cp))
    next_batch = watchdog.patient(lambda: desk.next_batch(layout.dp), "reading requests")
    while (requests := on_first_rank(next_batch)) is not None:
        results = run_batch(engine, desk, requests)
        on_first_rank(functools.partial(desk.take, results))
    peaks = gather_objects(peak_memory_bytes(device))
    return on_first_rank(lambda: desk.close(peaks))


def dtype_name(config: GenerateConfig, device: torch.device) -> str:
    """The type that the model computes in."""
    return config.dtype or ("bfloat16" if device.type == "cuda" else "float32")


def build_engine(
    config: GenerateConfig, description: CheckpointDescription, groups: Groups, device: torch.device
) -> Engine:
    """The checkpoint's model on this rank, ready to run requests."""
    dtype = getattr(torch, dtype_name(config, device))
    cache_dtype = getattr(torch, config.cache.dtype) if config.cache.dtype else dtype
    kind = config.attention.kind
    sliced = sliced_parts(
        config.parallel.decode, description.model, groups.layout, itemsize=dtype.itemsize, device_type=device.type
    )
    state = AttentionState(
        cache=KVCache(cache_dtype),
        kernel=get_kernel(config.attention.kernel, device, dtype),
        decode_kernel=get_kernel(config.attention.kernel, device, cache_dtype),
        cp_group=groups.cp,
        decode_group=groups.collection.tp_cp if sliced else None,
    )
    model = build_model(description.model, kind=kind, state=state, groups=groups.collection, dtype=dtype, device=device)
    load_weights(model, Path(str(config.checkpoint)))
    install(model, state, sliced)
    rotary = build_rotary(description.model, device)
    stage = Stage(
        model,
        rotary,
        groups.pp,
        description.model.vocab_size,
        decode_group=state.decode_group,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    return Engine(stage, state, groups, config.attention)


def run_batch(engine: Engine, desk: FrontDesk, requests: Sequence[Request]) -> list[Result]:
    """Run up to one request per replica; every replica's result, in order, on rank 0 (empty on the others)."""
    groups = engine.groups
    replica = groups.dp.rank()
    result = run_request(engine, desk, requests[replica]) if replica < len(requests) else None
    results: list[Result | None] = [result]
    if groups.dp.size() > 1 and groups.replica.rank() == 0:
        results = [None] * groups.dp.size()
        dist.gather_object(result, results if replica == 0 else None, group=groups.dp, group_dst=0)
    return [result for result in results if result is not None]


def run_request(engine: Engine, desk: FrontDesk, request: Request) -> Result | None:
    """Answer one request on the ranks of a replica; its first rank chooses the tokens and gets the result."""
    answer = desk.begin(request) if engine.groups.replica.rank() == 0 else None
    tokens_to_generate = desk.config.inference.tokens_to_generate
    engine.encode_context(
        request.context_ids,
        new_tokens=len(request.query_ids) + tokens_to_generate,
        on_block=desk.block_done if answer else lambda: None,
    )
    steps = engine.generate(
        request.query_ids, tokens_to_generate=tokens_to_generate, choose=answer.choose if answer else None
    )
    for step in steps:
        if answer:
            answer.keep(step)
    prefill = engine.prefill_report()
    return answer.finish(prefill) if answer else None
