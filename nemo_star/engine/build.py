"""A converted checkpoint -> an engine on this rank."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_star.attention.step import AttentionState
from nemo_star.checkpoint.description import CheckpointDescription
from nemo_star.checkpoint.load import load_weights
from nemo_star.config.llm import LLMConfig
from nemo_star.engine.engine import Engine
from nemo_star.kernels.registry import get_kernel
from nemo_star.methods.registry import method_of
from nemo_star.models.build import build_model, build_rotary
from nemo_star.models.decode_sharding import install
from nemo_star.models.stage import Stage
from nemo_star.parallel.decode_slices import sliced_matrices
from nemo_star.parallel.groups import Groups


def dtype_name(config: LLMConfig, device: torch.device) -> str:
    """The type that the model computes in."""
    return config.dtype or ("bfloat16" if device.type == "cuda" else "float32")


def build_engine(config: LLMConfig, description: CheckpointDescription, groups: Groups, device: torch.device) -> Engine:
    """The checkpoint's model on this rank, weights loaded, ready to encode."""
    dtype = getattr(torch, dtype_name(config, device))
    cache_dtype = getattr(torch, config.cache.dtype) if config.cache.dtype else dtype
    method, shape = method_of(config.attention), description.model
    sliced = sliced_matrices(
        config.parallel.decode, shape, groups.layout, itemsize=dtype.itemsize, device_type=device.type
    )
    state = AttentionState(
        kernel=get_kernel(config.attention.kernel, device, dtype),
        decode_kernel=get_kernel(config.attention.kernel, device, cache_dtype),
        cp_group=groups.cp,
        decode_group=groups.collection.tp_cp if sliced else None,
    )
    model = build_model(shape, method=method, state=state, groups=groups.collection, dtype=dtype, device=device)
    load_weights(model, Path(str(config.checkpoint)))
    install(model, state, sliced)
    stage = Stage(
        model,
        build_rotary(shape, device),
        groups.pp,
        shape.vocab_size,
        decode_group=state.decode_group,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    return Engine(stage, state, groups, method, cache_dtype=cache_dtype)
