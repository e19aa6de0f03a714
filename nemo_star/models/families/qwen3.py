"""Qwen3: norms of queries and keys, a head dimension of its own."""

from __future__ import annotations

from typing import Any

from nemo_star.models.families.family import Family, Values
from nemo_star.models.families.qwen2 import WINDOW_KEYS, chunked
from nemo_star.models.families.weights import decoder_weights


def settings(values: Values) -> dict[str, Any]:
    biases = values.get("attention_bias", False)
    return {"qk_norm": "head", "add_qkv_bias": biases, "add_projection_bias": biases, **chunked(values)}


FAMILY = Family(
    "Qwen3ForCausalLM",
    decoder_weights,
    settings,
    defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    required={"use_sliding_window": (False,)},
    read=WINDOW_KEYS | {"attention_bias", "dual_chunk_attention_config", "layer_types"},
)
