"""Phi-3, Phi-3.5 and Phi-4: queries, keys and values in one tensor, gate and up in one; mini models rotate a part of a
head's dimensions, with factors for short and for long contexts (longrope); Phi-3-mini-4k is windowed.
"""

from __future__ import annotations

from functools import partial

from nemo_star.models.families.decoder import decoder_weights
from nemo_star.models.families.family import Family
from nemo_star.models.families.layers import read_windows

FAMILY = Family(
    "Phi3ForCausalLM",
    partial(decoder_weights, fused_qkv=True, fused_gate_up=True),
    read_windows,
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    required={"attention_bias": (False,), "mlp_bias": (False,), "lm_head_bias": (False,)},
    rotates_part=True,
    read=frozenset({"sliding_window", "full_attn_mod", "interpolate_factor"}),
)
