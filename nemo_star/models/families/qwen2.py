"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values.

Beyond a chunk's length the variants for a million tokens attend with positions relative to chunks (dual chunk
attention, arXiv 2402.17463): up to there they are as the others, longer requests are refused.
"""

from __future__ import annotations

from typing import Any

from nemo_star.models.families.family import Family, Values
from nemo_star.models.families.weights import decoder_weights

WINDOW_KEYS = frozenset({"sliding_window", "max_window_layers"})
"""Without `use_sliding_window` they say nothing."""


def chunked(values: Values) -> dict[str, Any]:
    """The length up to which dual chunk attention is plain attention: a chunk without its local part."""
    dual = values.get("dual_chunk_attention_config")
    if not dual:
        return {}
    return {"max_exact_positions": dual["chunk_size"] - dual.get("local_size", 0)}


FAMILY = Family(
    "Qwen2ForCausalLM",
    decoder_weights,
    lambda values: {"add_qkv_bias": True, **chunked(values)},
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    required={"use_sliding_window": (False,)},
    read=WINDOW_KEYS | {"dual_chunk_attention_config", "layer_types", "use_mrope"},
)
