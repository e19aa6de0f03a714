"""GLM-4 and GLM-Z1 of April 2025 (0414): GLM with norms of what attention and FFN give back."""

from __future__ import annotations

from functools import partial

from nemo_star.models.families.decoder import LLAMA_NORMS, POST_ATTENTION, POST_MLP, decoder_weights
from nemo_star.models.families.family import Family, Values
from nemo_star.models.families.glm import DEFAULTS, settings

NORMS = {**LLAMA_NORMS, POST_ATTENTION: "post_self_attn_layernorm", POST_MLP: "post_mlp_layernorm"}


def _settings(values: Values) -> dict[str, object]:
    return {**settings(values), "norms": "both"}


FAMILY = Family(
    "Glm4ForCausalLM",
    partial(decoder_weights, norms=NORMS, fused_gate_up=True),
    _settings,
    defaults=DEFAULTS,
    rotates_part=True,
    read=frozenset({"attention_bias"}),
)
