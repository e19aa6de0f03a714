"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

from functools import partial
from typing import Any

from nemo_star.models.families.decoder import decoder_weights
from nemo_star.models.families.experts import ExpertNames
from nemo_star.models.families.family import Family, Values
from nemo_star.models.families.layers import read_windows

NAMES = ExpertNames("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}", "w1", "w3", "w2")


def _settings(values: Values) -> dict[str, Any]:
    return {
        **read_windows(values),
        "moe": {
            "num_experts": values["num_local_experts"],
            "experts_per_token": values["num_experts_per_tok"],
            "ffn_hidden_size": values["intermediate_size"],
        },
    }


FAMILY = Family(
    "MixtralForCausalLM",
    partial(decoder_weights, experts=NAMES),
    _settings,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    read=frozenset(
        {
            "sliding_window",
            "num_local_experts",
            "num_experts_per_tok",
            "output_router_logits",
            "router_aux_loss_coef",
            "router_jitter_noise",
        }
    ),
)
