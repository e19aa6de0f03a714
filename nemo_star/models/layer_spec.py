"""Which implementation of Megatron's transformer layer a model gets: Transformer Engine's modules, or Megatron's own;
and what of its spec a family changes.

Both have the same weights and, in a dist_checkpoint, the same keys: one converted checkpoint loads into either.
The two spec functions differ between Megatron 0.16 and 0.19 in what else they take (mixture of experts, MLA, Kitchen);
the keywords used here are in all of them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_star.config.model import ModelConfig
from nemo_star.models.norms import NormedAdd, ProjectionNorm, ZeroCenteredRMSNorm
from nemo_star.runtime.transformer_engine import is_loaded

Implementation = Literal["transformer_engine", "local"]
"""Values of TransformerConfig.transformer_impl."""


def implementation_for(device: torch.device, dtype: torch.dtype) -> Implementation:
    """Transformer Engine where it works; its matrix products in float32 are TF32, so float32 stays with torch's."""
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "transformer_engine" if fits and is_loaded() else "local"


def gpt_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Megatron's GPT layer spec as `config.transformer_impl` asks for it.

    That field is `transformer_engine` by default also where there is none: then the layers are Megatron's own.
    """
    if config.transformer_impl == "transformer_engine" and is_loaded():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)


def adapt(spec: ModuleSpec, model: ModelConfig, config: TransformerConfig, tp_group: dist.ProcessGroup) -> None:
    """Change Megatron's layer spec into the family's: biases, norms, and where they are."""
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    if model.norms == "post":
        _without_pre_norms(layer, fused=config.transformer_impl == "transformer_engine")
    if model.norms != "pre":
        _with_post_norms(layer, model, config)
    if model.zero_centered_norms and config.transformer_impl == "local":
        for place in ("input_layernorm", "pre_mlp_layernorm"):
            if getattr(layer, place) is not IdentityOp:
                setattr(layer, place, ZeroCenteredRMSNorm)
        if model.qk_norm == "head":
            attention.q_layernorm = attention.k_layernorm = ZeroCenteredRMSNorm
    if model.qk_norm == "projection":
        for name, heads in (("q_layernorm", model.num_attention_heads), ("k_layernorm", model.num_query_groups)):
            setattr(attention, name, ModuleSpec(ProjectionNorm, params={"heads": heads, "tp_group": tp_group}))
    # `config.add_bias_linear` is the FFN's; Megatron would have it for attention, too.
    if model.add_mlp_bias and not model.add_qkv_bias:
        attention.linear_qkv = _with_bias(attention.linear_qkv, False)
    if model.add_projection_bias != model.add_mlp_bias:
        attention.linear_proj = _with_bias(attention.linear_proj, model.add_projection_bias)


def with_experts(spec: ModuleSpec, moe: type) -> None:
    """Put a mixture of experts in the place of the MLP; the norm before it is then nowhere fused."""
    layer = spec.submodules
    if layer.pre_mlp_layernorm is IdentityOp:
        from megatron.core.extensions.transformer_engine import TENorm

        layer.pre_mlp_layernorm = TENorm
    layer.mlp = moe
    names = layer.sharded_state_dict_keys_map
    layer.sharded_state_dict_keys_map = {old: new for old, new in names.items() if old != "pre_mlp_layernorm."}


def _without_pre_norms(layer: Any, *, fused: bool) -> None:
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    layer.sharded_state_dict_keys_map = {}
    if fused:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        class PlainLinears(TESpecProvider):
            def fuse_layernorm_and_linear(self) -> bool:
                return False

        layer.self_attention.submodules.linear_qkv = PlainLinears().column_parallel_linear()
        layer.mlp = get_mlp_module_spec_for_backend(backend=PlainLinears())


def _with_post_norms(layer: Any, model: ModelConfig, config: TransformerConfig) -> None:
    """Keys as Megatron-Bridge has them for Gemma 3, whose linear layers end in their norm."""
    params = {"config": config, "zero_centered": model.zero_centered_norms}
    layer.self_attn_bda = ModuleSpec(NormedAdd, params=params)
    layer.mlp_bda = ModuleSpec(NormedAdd, params=params)
    layer.sharded_state_dict_keys_map = layer.sharded_state_dict_keys_map | {
        "self_attn_bda.": "self_attention.linear_proj.",
        "mlp_bda.": "mlp.linear_fc2.",
    }


def _with_bias(linear: type, bias: bool) -> type:
    """A linear layer with or without a bias, whatever Megatron asks for."""

    def build(self: Any, *arguments: Any, **keywords: Any) -> None:
        linear.__init__(self, *arguments, **{**keywords, "bias": bias})  # type: ignore[misc]

    return type(linear.__name__, (linear,), {"__init__": build})
