"""A converted checkpoint -> an engine on this rank."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from nemo_star.attention.step import AttentionState
from nemo_star.checkpoint.description import CheckpointDescription
from nemo_star.checkpoint.load import load_weights
from nemo_star.config.llm import DecodeConfig, LLMConfig
from nemo_star.engine.engine import Engine
from nemo_star.engine.graphs import StepGraphs, cuda_step_graphs
from nemo_star.kernels.registry import get_kernel, get_merge
from nemo_star.kernels.settle import Heads, settle, settle_merge
from nemo_star.kernels.stored import computed_type, stored_type
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.registry import method_of
from nemo_star.models.build import build_model
from nemo_star.models.decode_sharding import install
from nemo_star.models.direct_linears import install_few_rows
from nemo_star.models.rotary import PositionRotaryEmbedding, build_rotary, build_windowed_rotary
from nemo_star.models.stage import Stage
from nemo_star.models.torch_linears import install_torch_linears
from nemo_star.parallel.decode_slices import Sliced, sliced_matrices
from nemo_star.parallel.groups import Groups
from nemo_star.runtime.launch import warn


def dtype_name(config: LLMConfig, device: torch.device) -> str:
    """The type that the model computes in."""
    return config.dtype or ("bfloat16" if device.type == "cuda" else "float32")


def build_engine(config: LLMConfig, description: CheckpointDescription, groups: Groups, device: torch.device) -> Engine:
    """The checkpoint's model on this rank, weights loaded, ready to encode."""
    dtype, shape = getattr(torch, dtype_name(config, device)), description.model
    sliced = sliced_matrices(
        config.parallel.decode, shape, groups.layout, itemsize=dtype.itemsize, device_type=device.type
    )
    cache_dtype = stored_type(config.cache.dtype) if config.cache.dtype else dtype
    state = attention_state(
        config.attention, groups, device=device, dtype=dtype, cache_dtype=cache_dtype, divides_decode=bool(sliced)
    )
    state.merge = get_merge(config.parallel.merge, device)
    model = build_model(shape, state=state, groups=groups, dtype=dtype, device=device)
    load_weights(model, Path(str(config.checkpoint)), layer_by_layer=shape.layers_differ or description.unstacked)
    return engine_around(
        model,
        state,
        groups,
        rotary=build_rotary(shape, device),
        windowed_rotary=build_windowed_rotary(shape, device),
        vocab_size=shape.vocab_size,
        sliced=sliced,
        sequence_parallel=config.parallel.sequence_parallel,
        decode=config.decode,
    )


def attention_state(
    attention: AttentionConfig,
    groups: Groups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    divides_decode: bool = False,
) -> AttentionState:
    """What the attention layers of a model need before it is built (`star_layer_spec`).

    Args:
        dtype: the model computes in.
        cache_dtype: of cached K/V; None: the model's.
        divides_decode: cp ranks share the work of a token (parallel.decode=sharded).

    Raises:
        ValueError: the kernel that `attention` asks for does not run here.
    """
    cache_dtype = cache_dtype or dtype
    return AttentionState(
        method=method_of(attention),
        cp_group=groups.cp,
        kernel=get_kernel(attention.kernel, device, dtype),
        decode_kernel=get_kernel(attention.kernel, device, computed_type(cache_dtype, dtype)),
        cache_dtype=cache_dtype,
        merge=get_merge("auto", device),
        decode_group=groups.collection.tp_cp if divides_decode else None,
    )


def engine_around(
    model: GPTModel,
    state: AttentionState,
    groups: Groups,
    *,
    rotary: PositionRotaryEmbedding,
    windowed_rotary: PositionRotaryEmbedding | None = None,
    vocab_size: int,
    sliced: frozenset[Sliced] = frozenset({"ffn", "head"}),
    sequence_parallel: bool = False,
    decode: DecodeConfig | None = None,
) -> Engine:
    """An engine around a GPTModel, weights loaded, whose layers come from `star_layer_spec(config, state)`.

    Args:
        rotary: angles for the layers, by position id.
        windowed_rotary: for windowed layers, where theirs differ.
        vocab_size: true size, without rows that pad it to tp.
        sliced: what cp ranks divide of a token's work, where `state` says that they do.
        sequence_parallel: hidden states of context blocks divided over tp ranks.
        decode: how a decode step gets to the device; None: as it is by default.
    """
    install(model, state, sliced)
    decode = decode or DecodeConfig()
    if decode.torch_linears:
        install_torch_linears(model, state)
    install_few_rows(model, state)
    stage = Stage(
        model,
        rotary,
        groups.pp,
        vocab_size,
        windowed_rotary=windowed_rotary,
        decode_group=state.decode_group,
        sequence_parallel=sequence_parallel,
    )
    _settle_kernels(state, stage)
    engine = Engine(stage, state, groups)
    if decode.cuda_graph:
        engine.graphs = StepGraphs(engine, cuda_step_graphs())
    return engine


@torch.inference_mode()
def _settle_kernels(state: AttentionState, stage: Stage) -> None:
    """Let the kernels that were chosen by device and type fit the model, and say what became of them."""
    shape = stage.kv_shape
    heads = stage.model.config.num_attention_heads // stage.model.tp_group.size()
    sizes = Heads(heads, shape.groups, shape.channels, stage.window)
    device = stage.device
    state.kernel, why = settle(state.kernel, sizes, device, stage.dtype, decode=False)
    computed = computed_type(state.cache_dtype, stage.dtype)
    state.decode_kernel, why_decode = settle(
        state.decode_kernel, sizes, device, computed, decode=True, stored=state.cache_dtype
    )
    state.merge, why_merge = settle_merge(state.merge, sizes, device, stage.dtype)
    for problem in {why, why_decode, why_merge} - {None}:
        warn(str(problem))
