"""Mistral 7B from v0.2 on, Mistral Nemo, Small and Large: Llama with a head dimension of its own."""

from __future__ import annotations

from nemo_star.models.families.family import Family
from nemo_star.models.families.weights import decoder_weights

FAMILY = Family(
    "MistralForCausalLM",
    decoder_weights,
    # A config.json without the key means 4,096 to transformers: version 0.1, whose layers are all windowed.
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
    required={"sliding_window": (None,)},
)
