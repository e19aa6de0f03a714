"""What Megatron keeps inside core attention is refused by name, also for a model that somebody else builds."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_star.engine.build import attention_state
from nemo_star.methods.config import AttentionConfig
from nemo_star.models.build import star_layer_spec
from nemo_star.models.guard import ACCEPTED, check_core_attention

SETTINGS = {
    "window_size": (128, 0),
    "softmax_type": "learnable",
    "attention_dropout": 0.1,
    "apply_query_key_layer_scaling": True,
    "qk_clip": True,
    "fp8_dot_product_attention": True,
}
"""Fields of this Megatron's TransformerConfig that one may set by themselves."""


def config(**settings):
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "cuda_graph_scope": []}
    return TransformerConfig(**sizes, use_cpu_initialization=True, **{"attention_dropout": 0.0, **settings})


@pytest.fixture(scope="module")
def state(groups):
    return attention_state(AttentionConfig(), groups, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_refused_by_name_and_value(state, name):
    with pytest.raises(ValueError, match=rf"TransformerConfig: {name}=.* is supported\).*replaces"):
        star_layer_spec(config(**{name: SETTINGS[name]}), state)


def test_every_field_of_the_table_is_looked_at():
    for name in ACCEPTED:
        plain = {field: values[0] for field, values in ACCEPTED.items()}
        check_core_attention(SimpleNamespace(**plain))
        with pytest.raises(ValueError, match=name):
            check_core_attention(SimpleNamespace(**{**plain, name: "something"}))


def test_plain_attention_passes_and_so_do_fields_that_a_release_lacks(state):
    star_layer_spec(config(), state)
    check_core_attention(SimpleNamespace(attention_dropout=0.0))


def test_all_that_is_wrong_is_said_at_once(state):
    with pytest.raises(ValueError, match=r"window_size=\(64, 0\).*attention_dropout=0.1"):
        star_layer_spec(config(window_size=(64, 0), attention_dropout=0.1), state)
