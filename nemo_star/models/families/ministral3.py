"""Ministral 3: Mistral with YaRN, and queries scaled by position.

Under star an anchor's tokens keep their positions, so queries are scaled as they are in dense attention.
"""

from __future__ import annotations

from typing import Any

from nemo_star.models.families.decoder import decoder_weights
from nemo_star.models.families.family import Family, Values
from nemo_star.models.families.layers import WINDOW_KEYS, read_windows
from nemo_star.models.families.rope import group


def _settings(values: Values) -> dict[str, Any]:
    rope = group(values)
    beta = rope.get("llama_4_scaling_beta")
    if not beta:
        return read_windows(values)
    original = rope.get("original_max_position_embeddings") or values["max_position_embeddings"]
    scaling = {"beta": beta, "original_max_position_embeddings": original}
    return {"query_scaling": scaling, **read_windows(values)}


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
    read=WINDOW_KEYS,
)
