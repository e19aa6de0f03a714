"""Gemma 3 (text): five windowed layers to one that sees everything, each kind with a rotary base of its own; norms
before and after attention and FFN, of queries and keys, all times 1 + weight; embeddings scaled.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nemo_star.models.families.decoder import POST_ATTENTION, POST_MLP, PRE_ATTENTION, PRE_MLP, decoder_weights
from nemo_star.models.families.family import Family, Values
from nemo_star.models.families.layers import WINDOW_KEYS, read_windows
from nemo_star.models.families.rope import full_group, windowed_rotary_base

NORMS = {
    PRE_ATTENTION: "input_layernorm",
    POST_ATTENTION: "post_attention_layernorm",
    PRE_MLP: "pre_feedforward_layernorm",
    POST_MLP: "post_feedforward_layernorm",
}


def _settings(values: Values) -> dict[str, Any]:
    biases, every = values.get("attention_bias", False), values["sliding_window_pattern"]
    base = windowed_rotary_base(values, values["rope_local_base_freq"])
    return {
        **read_windows(values, lambda layer: (layer + 1) % every != 0, rotary_base=base),
        "add_qkv_bias": biases,
        "add_projection_bias": biases,
        "norms": "both",
        "zero_centered_norms": True,
        "qk_norm": "head",
        "activation": "gelu_tanh",
        "softmax_scale": values["query_pre_attn_scalar"] ** -0.5,
        "embedding_scale": values["hidden_size"] ** 0.5,
    }


FAMILY = Family(
    "Gemma3ForCausalLM",
    partial(decoder_weights, norms=NORMS),
    _settings,
    # Checkpoints of transformers before 5 leave out what is so in its class, sizes included.
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    required={
        "hidden_act": ("gelu_pytorch_tanh",),
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False,),
    },
    rope=full_group,
    read=WINDOW_KEYS
    | {
        "attention_bias",
        "cache_implementation",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
        "sliding_window_pattern",
    },
)
