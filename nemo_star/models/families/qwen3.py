"""Qwen3: norms of queries and keys, a head dimension of its own."""

from __future__ import annotations

from typing import Any

from nemo_star.models.families.decoder import decoder_weights
from nemo_star.models.families.family import Family, Values
from nemo_star.models.families.qwen2 import SWITCHED_WINDOW_KEYS, WINDOW_DEFAULTS, chunked, switched_windows


def settings(values: Values) -> dict[str, Any]:
    biases = values.get("attention_bias", False)
    return {"qk_norm": "head", "add_qkv_bias": biases, "add_projection_bias": biases, **chunked(values)}


FAMILY = Family(
    "Qwen3ForCausalLM",
    decoder_weights,
    lambda values: {**settings(values), **switched_windows(values)},
    defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, **WINDOW_DEFAULTS},
    read=SWITCHED_WINDOW_KEYS | {"attention_bias", "dual_chunk_attention_config"},
)
