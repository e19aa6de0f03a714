"""Which layers of a config.json are windowed, and how they are rotated, as transformers reads it."""

import pytest

from nemo_star.models.families import families

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 9000,
}
FULL, WINDOWED = "full_attention", "sliding_attention"


def model_of(family, **values):
    return families()[f"{family}ForCausalLM"].model_config({**SIZES, **values})


PATTERNS = {
    "gpt-oss": ("GptOss", {}),
    "Gemma 3": ("Gemma3", {}),
    "Gemma 3 as before layer_types": ("Gemma3", {"sliding_window": 512, "sliding_window_pattern": 3}),
    "OLMo 3": ("Olmo3", {}),
    "OLMo 3 as it says": ("Olmo3", {"layer_types": [FULL, WINDOWED] * 4}),
    "Qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 5}),
    "Qwen2 without windows": ("Qwen2", {"sliding_window": 512, "max_window_layers": 5}),
    "Qwen2 by default": ("Qwen2", {"use_sliding_window": True}),
    "Qwen3": ("Qwen3", {"use_sliding_window": True, "max_window_layers": 3}),
}
"""Whose layers transformers names."""


@pytest.mark.parametrize("case", PATTERNS)
def test_layers_are_those_of_transformers(case):
    import transformers

    family, values = PATTERNS[case]
    config = getattr(transformers, f"{family}ForCausalLM").config_class(**{**SIZES, **values})
    model = model_of(family, **values)
    assert model.windowed_layers == tuple(n for n, kind in enumerate(config.layer_types) if kind == WINDOWED)
    assert model.window_size == (config.sliding_window if model.windowed_layers else None)


ALL = {
    "Mistral 7B v0.1": ("Mistral", {"sliding_window": 4096}, 4096),
    "Mistral without the key": ("Mistral", {}, 4096),
    "Mistral from v0.2 on": ("Mistral", {"sliding_window": None}, None),
    "a window as long as the model's positions": ("Mistral", {"sliding_window": 9000}, None),
    "Ministral 3 without the key": ("Ministral3", {}, None),
    "Mixtral": ("Mixtral", {"sliding_window": 100}, 100),
    "Mixtral without the key": ("Mixtral", {}, None),
    "Phi-3-mini-4k": ("Phi3", {"sliding_window": 2047}, 2047),
    "Phi-4-mini": ("Phi3", {"sliding_window": 262144}, None),
    "Qwen3-MoE": ("Qwen3Moe", {"use_sliding_window": True, "sliding_window": 100}, 100),
    "Qwen3-MoE without windows": ("Qwen3Moe", {"sliding_window": 100, "max_window_layers": 4}, None),
}
"""Families that have windows in all layers or none."""


@pytest.mark.parametrize("case", ALL)
def test_windows_of_all_layers(case):
    family, values, window = ALL[case]
    model = model_of(family, **values)
    assert model.window_size == window
    assert model.windowed_layers == (() if window is None else tuple(range(8)))


LINEAR = {"rope_type": "linear", "factor": 8.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1000, "attention_factor": 1.2}
ROTATIONS = {
    "Gemma 3": ("Gemma3", {}, 1e6, None, 1e4),
    "Gemma 3 of transformers 4": (
        "Gemma3",
        {"rope_theta": 3e5, "rope_local_base_freq": 200.0, "rope_scaling": LINEAR},
        3e5,
        "linear",
        200.0,
    ),
    "Gemma 3 of transformers 5": (
        "Gemma3",
        {
            "rope_parameters": {
                FULL: {**LINEAR, "rope_theta": 4e5},
                WINDOWED: {"rope_type": "default", "rope_theta": 300.0},
            }
        },
        4e5,
        "linear",
        300.0,
    ),
    "OLMo 3 before it is stretched": ("Olmo3", {"rope_theta": 5e5}, 5e5, None, None),
    "OLMo 3": ("Olmo3", {"rope_theta": 5e5, "rope_scaling": YARN}, 5e5, "yarn", 5e5),
    "OLMo 3 of transformers 5": (
        "Olmo3",
        {"rope_parameters": {FULL: {**YARN, "rope_theta": 6e5}, WINDOWED: {"rope_theta": 7e5}}},
        6e5,
        "yarn",
        7e5,
    ),
    "gpt-oss": ("GptOss", {"rope_theta": 15e4, "rope_scaling": {**YARN, "truncate": False}}, 15e4, "yarn", None),
    "gpt-oss by default": ("GptOss", {}, 15e4, "yarn", None),
    "no layer of the other kind": ("Gemma3", {"layer_types": [FULL] * 8}, 1e6, None, None),
}


@pytest.mark.parametrize("case", ROTATIONS)
def test_both_kinds_of_layers_are_rotated_as_config_json_says(case):
    family, values, base, kind, windowed = ROTATIONS[case]
    model = model_of(family, **values)
    assert (model.rotary_base, model.windowed_rotary_base) == (base, windowed)
    assert (None if model.rope_scaling is None else model.rope_scaling.rope_type) == kind


REFUSED = {
    "another kind of layers": (
        "Olmo3",
        {"layer_types": [FULL, "chunked_attention"] * 4},
        "layer_types has chunked_attention: not supported",
    ),
    "too few layers": ("GptOss", {"layer_types": [FULL]}, "layer_types (1) must name a kind for each"),
    "kinds that are no list": ("GptOss", {"layer_types": FULL}, "layer_types (no list) must name"),
    "windowed layers without a window": (
        "Qwen3",
        {"layer_types": [FULL, WINDOWED] * 4},
        "layer_types has sliding_attention, but no layer has a sliding_window",
    ),
    "a window that is no number": ("Mistral", {"sliding_window": "4K"}, "sliding_window='4K' must be of type int"),
    "layers that are no number": ("Mistral", {"num_hidden_layers": "8"}, "num_hidden_layers='8' must be of type int"),
    "layers that transformers reads otherwise": (
        "Qwen3Moe",
        {"use_sliding_window": True, "max_window_layers": 4},
        "max_window_layers=4 is not supported for Qwen3MoeForCausalLM",
    ),
    "windowed layers that are stretched": (
        "Gemma3",
        {"rope_parameters": {WINDOWED: {**LINEAR, "rope_theta": 1e4}}},
        "rope scaling of type 'linear' with factor is not supported for windowed layers",
    ),
    "one group where there are two": ("Olmo3", {"rope_parameters": YARN}, "rope_parameters with attention_factor"),
    "capped scores": ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
    "capped logits": ("Gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
    "both directions": ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not"),
    "another activation of Gemma": ("Gemma3", {"hidden_activation": "silu"}, "hidden_activation='silu' is not"),
    "another activation of gpt-oss": ("GptOss", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    "windows of a family without": ("Llama", {"sliding_window": 4096}, "sliding_window=4096: not known for Llama"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case):
    family, values, message = REFUSED[case]
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        model_of(family, **values)


def test_null_means_the_default_but_of_a_window():
    model = model_of("GptOss", swiglu_limit=None, sliding_window=None)
    assert model.moe.clamped_gate.limit == 7.0
    assert model.windowed_layers == ()
