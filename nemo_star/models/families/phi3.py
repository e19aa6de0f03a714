"""Phi-3, Phi-3.5 and Phi-4: queries, keys and values in one tensor, gate and up in one; mini models rotate a part of a
head's dimensions, with factors for short and for long contexts (longrope).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nemo_star.models.families.family import Family, Values
from nemo_star.models.families.weights import decoder_weights


def _settings(values: Values) -> dict[str, Any]:
    window, longest = values.get("sliding_window"), values.get("max_position_embeddings", 4096)
    if window is not None and window < longest:
        raise ValueError(
            f"config.json: sliding_window={window} is shorter than max_position_embeddings={longest}: "
            "windowed layers are not supported for Phi-3"
        )
    return {}


FAMILY = Family(
    "Phi3ForCausalLM",
    partial(decoder_weights, fused_qkv=True, fused_gate_up=True),
    _settings,
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    required={"attention_bias": (False,), "mlp_bias": (False,), "lm_head_bias": (False,)},
    rotates_part=True,
    read=frozenset({"sliding_window", "full_attn_mod", "interpolate_factor"}),
)
