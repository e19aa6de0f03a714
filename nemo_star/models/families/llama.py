"""Llama 2, 3, 3.1, 3.2, 3.3."""

from __future__ import annotations

from typing import Any

from nemo_star.models.families.decoder import decoder_weights
from nemo_star.models.families.family import Family, Values


def _settings(values: Values) -> dict[str, Any]:
    biases = values.get("attention_bias", False)
    return {
        "add_qkv_bias": biases,
        "add_projection_bias": biases,
        "add_mlp_bias": values.get("mlp_bias", False),
    }


FAMILY = Family(
    "LlamaForCausalLM",
    decoder_weights,
    _settings,
    read=frozenset({"attention_bias", "mlp_bias"}),
)
