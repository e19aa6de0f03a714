"""`tools/generate.py`: a parsed recipe -> model on all ranks -> answers.

Rank 0 has a front desk that reads and checks requests and writes answers; all ranks run the engine.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_star.answer import Result
from nemo_star.attention import AttentionState
from nemo_star.attention.kernels import get_kernel
from nemo_star.cache import KVCache
from nemo_star.checkpoint.description import CheckpointDescription, read_description
from nemo_star.checkpoint.load import load_weights
from nemo_star.config import GenerateConfig
from nemo_star.distributed import (
    Groups,
    create_groups,
    gather_objects,
    initialize,
    on_every_rank,
    on_first_rank,
    plan_layout,
)
from nemo_star.engine import Engine
from nemo_star.frontdesk import FrontDesk
from nemo_star.launch import environment_world_size
from nemo_star.memory import peak_memory_bytes
from nemo_star.model import build_model, build_rotary, check_layout
from nemo_star.pipeline import Stage
from nemo_star.requests import Request
from nemo_star.sequence_parallel import check_sequence_parallel


def run(config: GenerateConfig) -> int:
    """Answer everything that `config` asks for; returns the exit code.

    Raises:
        ValueError, OSError: a user's error, on all ranks alike.
    """
    layout = plan_layout(config.parallel, kind=config.attention.kind, world_size=environment_world_size())
    device = initialize(config.parallel.timeout_minutes)
    check_sequence_parallel(config.parallel.sequence_parallel, layout, device.type)
    groups = create_groups(layout, config.parallel.timeout_minutes)
    description = on_first_rank(lambda: read_description(Path(str(config.checkpoint))))
    check_layout(description.model, layout, config.attention.kind)
    desk = FrontDesk(config, description.model)
    on_every_rank(lambda: desk.load_tokenizer() if groups.replica.rank() == 0 else None)
    on_first_rank(desk.open)
    engine = build_engine(config, description, groups, device)
    on_first_rank(lambda: desk.start(kernel=engine.state.kernel.name, dtype=engine.dtype, cp_size=layout.cp))
    while (requests := on_first_rank(lambda: desk.next_batch(layout.dp))) is not None:
        results = run_batch(engine, desk, requests)
        on_first_rank(functools.partial(desk.take, results))
    peaks = gather_objects(peak_memory_bytes(device))
    return on_first_rank(lambda: desk.close(peaks))


def build_engine(
    config: GenerateConfig, description: CheckpointDescription, groups: Groups, device: torch.device
) -> Engine:
    """The checkpoint's model on this rank, ready to run requests."""
    dtype = getattr(torch, config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    cache_dtype = getattr(torch, config.cache.dtype) if config.cache.dtype else dtype
    kind = config.attention.kind
    state = AttentionState(
        cache=KVCache(cache_dtype),
        kernel=get_kernel(config.attention.kernel, device, dtype),
        decode_kernel=get_kernel(config.attention.kernel, device, cache_dtype),
        cp_group=groups.cp,
    )
    model = build_model(description.model, kind=kind, state=state, groups=groups.collection, dtype=dtype, device=device)
    load_weights(model, Path(str(config.checkpoint)))
    rotary = build_rotary(description.model, device)
    stage = Stage(
        model,
        rotary,
        groups.pp,
        description.model.vocab_size,
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
