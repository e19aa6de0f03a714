"""GLM-4.5 and 4.6: experts chosen by sigmoid scores with a correction bias, a shared expert, the first layers dense;
half of a head's dimensions rotated. The layer that predicts a second token is left out, as in transformers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nemo_star.config.model import ModelConfig
from nemo_star.models.families.decoder import decoder_weights
from nemo_star.models.families.experts import ExpertNames
from nemo_star.models.families.family import Family, Values


def _settings(values: Values) -> dict[str, Any]:
    return {
        "add_qkv_bias": values.get("attention_bias", False),
        "qk_norm": "head" if values.get("use_qk_norm", False) else "none",
        "moe": {
            "num_experts": values["n_routed_experts"],
            "experts_per_token": values["num_experts_per_tok"],
            "ffn_hidden_size": values["moe_intermediate_size"],
            "score_function": "sigmoid",
            "normalizes": values.get("norm_topk_prob", True),
            "scaling_factor": values.get("routed_scaling_factor", 1.0),
            "num_groups": values.get("n_group", 1),
            "groups_per_token": values.get("topk_group", 1),
            "correction_bias": True,
            "shared_ffn_hidden_size": values["moe_intermediate_size"] * values["n_shared_experts"],
            "dense_layers": list(range(values["first_k_dense_replace"])),
        },
    }


def _second_token(name: str, model: ModelConfig) -> bool:
    return name.startswith(f"model.layers.{model.num_layers}.")


FAMILY = Family(
    "Glm4MoeForCausalLM",
    partial(decoder_weights, experts=ExpertNames()),
    _settings,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
    },
    rotates_part=True,
    ignores=_second_token,
    read=frozenset(
        {
            "attention_bias",
            "first_k_dense_replace",
            "moe_intermediate_size",
            "n_group",
            "n_routed_experts",
            "n_shared_experts",
            "norm_topk_prob",
            "num_experts_per_tok",
            "num_nextn_predict_layers",
            "output_router_logits",
            "router_aux_loss_coef",
            "routed_scaling_factor",
            "topk_group",
            "use_qk_norm",
        }
    ),
)
