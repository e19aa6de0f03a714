"""`tools/generate.py`: a parsed recipe -> model on all ranks -> answers.

Rank 0 has a front desk that reads and checks requests and writes answers; all ranks run the engine.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_star.attention import AttentionState
from nemo_star.attention.kernels import get_kernel
from nemo_star.cache import KVCache
from nemo_star.checkpoint.description import CheckpointDescription, read_description
from nemo_star.checkpoint.load import load_weights
from nemo_star.config import GenerateConfig
from nemo_star.distributed import create_groups, gather_objects, initialize, on_every_rank, on_first_rank, plan_layout
from nemo_star.engine import Engine
from nemo_star.frontdesk import FrontDesk
from nemo_star.launch import environment_world_size
from nemo_star.memory import peak_memory_bytes
from nemo_star.model import build_model
from nemo_star.requests import BadRequest, Request


def run(config: GenerateConfig) -> int:
    """Answer everything that `config` asks for; returns the exit code.

    Raises:
        ValueError, OSError: a user's error, on all ranks alike.
    """
    layout = plan_layout(config.parallel, kind=config.attention.kind, world_size=environment_world_size())
    device = initialize(config.parallel.timeout_minutes)
    groups = create_groups(layout, device)
    description = on_first_rank(lambda: read_description(Path(str(config.checkpoint))))
    desk = FrontDesk(config, description)
    on_first_rank(desk.open)
    engine = on_every_rank(lambda: build_engine(config, description, groups, device))
    on_first_rank(desk.start)
    while (request := on_first_rank(desk.next_request)) is not None:
        if isinstance(request, BadRequest):
            on_first_rank(lambda: desk.reject(request))
        else:
            answer(engine, desk, request, tokens_to_generate=config.inference.tokens_to_generate)
    peaks = gather_objects(peak_memory_bytes(device))
    return on_first_rank(lambda: desk.close(peaks))


def build_engine(
    config: GenerateConfig, description: CheckpointDescription, groups: ProcessGroupCollection, device: torch.device
) -> Engine:
    """The checkpoint's model on this rank, ready to run requests."""
    dtype = getattr(torch, config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    cache_dtype = getattr(torch, config.cache.dtype) if config.cache.dtype else dtype
    state = AttentionState(
        cache=KVCache(cache_dtype),
        kernel=get_kernel(config.attention.kernel, device, cache_dtype),
        cp_group=groups.cp,
    )
    model = build_model(
        description.model, kind=config.attention.kind, state=state, groups=groups, dtype=dtype, device=device
    )
    load_weights(model, Path(str(config.checkpoint)))
    return Engine(model, state, groups, config.attention)


def answer(engine: Engine, desk: FrontDesk, request: Request, *, tokens_to_generate: int) -> None:
    """Run one request on every rank; the desk of rank 0 chooses the tokens and takes the answer."""
    partition = engine.partition(len(request.context_ids))
    growing = None
    if dist.get_rank() == 0:
        growing = desk.begin(request, partition, kernel=engine.state.kernel.name, dtype=str(engine.dtype))
    new_tokens = len(request.query_ids) + tokens_to_generate
    on_block = desk.block_done if growing else lambda: None
    prefill = engine.encode_context(request.context_ids, new_tokens=new_tokens, on_block=on_block)
    steps = engine.generate(
        request.query_ids, tokens_to_generate=tokens_to_generate, choose=growing.choose if growing else None
    )
    for step in steps:
        if growing:
            growing.keep(step)
    on_first_rank(lambda: desk.finish(growing, prefill) if growing else None)
