"""Qwen3-MoE: Qwen3 with experts, in every layer but those that config.json excepts."""

from __future__ import annotations

from functools import partial
from typing import Any

from nemo_star.models.families import qwen3
from nemo_star.models.families.decoder import decoder_weights
from nemo_star.models.families.experts import ExpertNames
from nemo_star.models.families.family import Family, Values
from nemo_star.models.families.qwen2 import switched_windows


def _settings(values: Values) -> dict[str, Any]:
    step, excepted = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers", [])
    layers = range(values["num_hidden_layers"])
    return {
        **qwen3.settings(values),
        **_windows(values),
        "moe": {
            # transformers 5 writes the one name, checkpoints of Qwen's have the other.
            "num_experts": values.get("num_experts") or values.get("num_local_experts", 128),
            "experts_per_token": values["num_experts_per_tok"],
            "ffn_hidden_size": values["moe_intermediate_size"],
            "normalizes": values.get("norm_topk_prob", False),
            "dense_layers": [layer for layer in layers if layer in excepted or (layer + 1) % step],
        },
    }


def _windows(values: Values) -> dict[str, Any]:
    """transformers has windows in all layers of this family, whatever `max_window_layers` says."""
    if values.get("use_sliding_window", False) and values["max_window_layers"] and "layer_types" not in values:
        raise ValueError(
            f"config.json: use_sliding_window=True with max_window_layers={values['max_window_layers']!r} is not "
            "supported for Qwen3MoeForCausalLM: transformers reads it otherwise; say in layer_types which layers are "
            "sliding_attention"
        )
    return switched_windows(values)


FAMILY = Family(
    "Qwen3MoeForCausalLM",
    partial(decoder_weights, experts=ExpertNames()),
    _settings,
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "sliding_window": 4096,
        "max_window_layers": 0,
    },
    read=qwen3.FAMILY.read
    | {
        "decoder_sparse_step",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
        "output_router_logits",
        "router_aux_loss_coef",
    },
)
