"""gpt-oss: every other layer windowed, a sink in each head, YaRN; experts in every layer, with biases and a clamped
gate, in tensors that hold all of a layer's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nemo_star.models.families.decoder import decoder_weights
from nemo_star.models.families.experts import ExpertNames
from nemo_star.models.families.family import Family, Values
from nemo_star.models.families.layers import WINDOW_KEYS, read_windows

NAMES = ExpertNames(router="mlp.router", experts="mlp.experts", together=True)


def _settings(values: Values) -> dict[str, Any]:
    biases = values["attention_bias"]
    return {
        **read_windows(values, lambda layer: layer % 2 == 0),
        "attention_sinks": True,
        "add_qkv_bias": biases,
        "add_projection_bias": biases,
        "moe": {
            "num_experts": values["num_local_experts"],
            "experts_per_token": values["num_experts_per_tok"],
            "ffn_hidden_size": values["intermediate_size"],
            "router_bias": True,
            "add_expert_bias": True,
            "clamped_gate": {"limit": values["swiglu_limit"], "alpha": values["swiglu_alpha"]},
        },
    }


FAMILY = Family(
    "GptOssForCausalLM",
    partial(decoder_weights, experts=NAMES),
    _settings,
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    read=WINDOW_KEYS
    | {
        "attention_bias",
        "experts_per_token",  # OpenAI's names of what num_experts_per_tok and the rope group say
        "initial_context_length",
        "num_experts_per_tok",
        "num_local_experts",
        "output_router_logits",
        "router_aux_loss_coef",
        "swiglu_alpha",
        "swiglu_limit",
    },
)
