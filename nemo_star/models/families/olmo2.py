"""OLMo 2: norms of what attention and FFN give back, none before them; queries and keys are normed over all heads."""

from __future__ import annotations

from functools import partial
from typing import Any

from nemo_star.models.families.decoder import POST_ATTENTION, POST_MLP, decoder_weights
from nemo_star.models.families.family import Family, Values

NORMS = {POST_ATTENTION: "post_attention_layernorm", POST_MLP: "post_feedforward_layernorm"}


def settings(values: Values) -> dict[str, Any]:
    biases = values.get("attention_bias", False)
    return {"norms": "post", "qk_norm": "projection", "add_qkv_bias": biases, "add_projection_bias": biases}


FAMILY = Family(
    "Olmo2ForCausalLM",
    partial(decoder_weights, norms=NORMS),
    settings,
    defaults={"rms_norm_eps": 1e-5},
    read=frozenset({"attention_bias"}),
)
