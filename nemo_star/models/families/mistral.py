"""Mistral 7B, Nemo, Small and Large: Llama with a head dimension of its own; all layers of version 0.1 are windowed."""

from __future__ import annotations

from nemo_star.models.families.decoder import decoder_weights
from nemo_star.models.families.family import Family
from nemo_star.models.families.layers import WINDOW_KEYS, read_windows

FAMILY = Family(
    "MistralForCausalLM",
    decoder_weights,
    read_windows,
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    read=WINDOW_KEYS,
)
