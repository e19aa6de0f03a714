"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values.

Beyond a chunk's length the variants for a million tokens attend with positions relative to chunks (dual chunk
attention, arXiv 2402.17463): up to there they are as the others, longer requests are refused.
"""

from __future__ import annotations

from typing import Any

from nemo_star.models.families.decoder import decoder_weights
from nemo_star.models.families.family import Family, Values
from nemo_star.models.families.layers import WINDOW_KEYS, read_windows

SWITCHED_WINDOW_KEYS = WINDOW_KEYS | {"use_sliding_window", "max_window_layers"}
WINDOW_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}


def switched_windows(values: Values) -> dict[str, Any]:
    """Layers from `max_window_layers` on, but only where `use_sliding_window` says so."""
    if not values.get("use_sliding_window", False):
        values = {name: value for name, value in values.items() if name != "sliding_window"}
    return read_windows(values, lambda layer: layer >= values["max_window_layers"])


def chunked(values: Values) -> dict[str, Any]:
    """The length up to which dual chunk attention is plain attention: a chunk without its local part."""
    dual = values.get("dual_chunk_attention_config")
    if not dual:
        return {}
    return {"max_exact_positions": dual["chunk_size"] - dual.get("local_size", 0)}


FAMILY = Family(
    "Qwen2ForCausalLM",
    decoder_weights,
    lambda values: {"add_qkv_bias": True, **chunked(values), **switched_windows(values)},
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, **WINDOW_DEFAULTS},
    read=SWITCHED_WINDOW_KEYS | {"dual_chunk_attention_config", "use_mrope"},
)
