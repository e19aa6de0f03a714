"""Sizes of the parallel dimensions, and whether a model goes with them. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_star.config.model import ModelConfig
from nemo_star.config.parallel import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions; their product is the world size."""

    tp: int
    cp: int
    dp: int
    pp: int


def plan_layout(config: ParallelConfig, *, kind: str, world_size: int) -> Layout:
    """The layout that `config` asks for on `world_size` ranks.

    Raises:
        ValueError: sizes that do not divide the world, or dense attention over several cp ranks.
    """
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    if world_size % (tp * pp):
        raise ValueError(
            f"world size {world_size} is not divisible by tensor_model_parallel_size {tp} "
            f"* pipeline_model_parallel_size {pp} = {tp * pp}"
        )
    rest = world_size // (tp * pp)
    cp = config.context_parallel_size or (1 if kind == "dense" else rest)
    if kind == "dense" and cp > 1:
        raise ValueError(
            f"attention=dense runs on 1 context-parallel rank, not parallel.context_parallel_size={cp}: "
            "the exact kinds that share a context over ranks are attention=ring and attention=ulysses"
        )
    if rest % cp:
        raise ValueError(
            f"world size {world_size} is not divisible by tensor_model_parallel_size {tp} "
            f"* pipeline_model_parallel_size {pp} * context_parallel_size {cp} = {tp * pp * cp}"
        )
    return Layout(tp=tp, cp=cp, dp=rest // cp, pp=pp)


def check_layout(model: ModelConfig, layout: Layout, kind: str) -> None:
    """Refuse a layout that the model does not divide by.

    Raises:
        ValueError: names both numbers.
    """
    tp, pp = layout.tp, layout.pp
    divided = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    for name, size in divided.items():
        if size % tp:
            raise ValueError(f"the model's {name} {size} is not divisible by tensor_model_parallel_size {tp}")
    if model.num_layers < pp:
        raise ValueError(f"the model's {model.num_layers} layers do not fill pipeline_model_parallel_size {pp} stages")
    if kind == "ulysses":
        check_heads(model.num_attention_heads // tp, model.num_query_groups // tp, layout.cp)


def check_heads(heads: int, groups: int, cp_size: int) -> None:
    """Refuse head counts of one tensor-parallel rank that cp ranks cannot share in Ulysses attention.

    Raises:
        ValueError: names the numbers.
    """
    if heads % cp_size:
        raise ValueError(
            f"attention=ulysses: {heads} query heads per tensor-parallel rank are not divisible by "
            f"context_parallel_size {cp_size}"
        )
    if groups % cp_size and cp_size % groups:
        raise ValueError(
            f"attention=ulysses: {groups} KV heads per tensor-parallel rank and context_parallel_size {cp_size}: "
            "one must be a multiple of the other"
        )
