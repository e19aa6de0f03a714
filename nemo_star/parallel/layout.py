"""Sizes of the parallel dimensions, and whether a model goes with them. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_star.config.model import ModelConfig
from nemo_star.config.parallel import ParallelConfig
from nemo_star.methods.method import Method
from nemo_star.methods.registry import known_kinds, method_class


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions; the product of tp, cp, dp and pp is the world size."""

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int = 1
    """Of the ranks of tp and cp, those that divide the experts of a mixture."""


def plan_layout(config: ParallelConfig, method: Method | None, *, world_size: int) -> Layout:
    """The layout that `config` asks for on `world_size` ranks; `method` None: for any that can share a context.

    Raises:
        ValueError: sizes that do not divide the world, or several cp ranks for a method that cannot share a context.
    """
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    if world_size % (tp * pp):
        raise ValueError(
            f"world size {world_size} is not divisible by tensor_model_parallel_size {tp} "
            f"* pipeline_model_parallel_size {pp} = {tp * pp}"
        )
    rest = world_size // (tp * pp)
    cp = config.context_parallel_size or (rest if method is None or method.shares_context else 1)
    if method is not None and not method.shares_context and cp > 1:
        exact = [kind for kind in known_kinds() if method_class(kind).exact and method_class(kind).shares_context]
        raise ValueError(
            f"attention={method.kind} runs on 1 context-parallel rank, not parallel.context_parallel_size={cp}: "
            f"exact, and shared over ranks, are {' and '.join(f'attention={kind}' for kind in exact)}"
        )
    if rest % cp:
        raise ValueError(
            f"world size {world_size} is not divisible by tensor_model_parallel_size {tp} "
            f"* pipeline_model_parallel_size {pp} * context_parallel_size {cp} = {tp * pp * cp}"
        )
    return Layout(tp=tp, cp=cp, dp=rest // cp, pp=pp, ep=config.expert_model_parallel_size)


def check_layout(model: ModelConfig, layout: Layout, method: Method | None) -> None:
    """Refuse a layout that the model does not divide by, whatever the method (None), or with this one.

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
    if method is not None:
        method.check_heads(model.num_attention_heads // tp, model.num_query_groups // tp, layout.cp)
