"""GLM-4 9B (2024) and its variant for a million tokens: half of a head's dimensions rotated, neighbours together;
biases of queries, keys and values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nemo_star.models.families.decoder import decoder_weights
from nemo_star.models.families.family import Family, Values

DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}


def settings(values: Values) -> dict[str, Any]:
    return {"add_qkv_bias": values["attention_bias"], "rotary_interleaved": True}


FAMILY = Family(
    "GlmForCausalLM",
    partial(decoder_weights, fused_gate_up=True),
    settings,
    defaults=DEFAULTS,
    rotates_part=True,
    read=frozenset({"attention_bias"}),
)
