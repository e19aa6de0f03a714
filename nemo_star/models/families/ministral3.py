"""Ministral 3: Mistral with YaRN, and queries scaled by position.

Under star an anchor's tokens keep their positions, so queries are scaled as they are in dense attention.
"""

from __future__ import annotations

from typing import Any

from nemo_star.models.families.family import Family, Values
from nemo_star.models.families.rope import group
from nemo_star.models.families.weights import decoder_weights


def _settings(values: Values) -> dict[str, Any]:
    rope = group(values)
    beta = rope.get("llama_4_scaling_beta")
    if not beta:
        return {}
    original = rope.get("original_max_position_embeddings") or values["max_position_embeddings"]
    return {"query_scaling": {"beta": beta, "original_max_position_embeddings": original}}


FAMILY = Family(
    "Ministral3ForCausalLM",
    decoder_weights,
    _settings,
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
    },
    required={"sliding_window": (None,)},
)
