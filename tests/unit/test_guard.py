"""What Megatron keeps inside core attention is refused by name, also for a model that somebody else builds."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from toy_method import SlidingWindow

from nemo_star.engine.build import attention_state
from nemo_star.methods.config import AttentionConfig
from nemo_star.models.build import star_layer_spec
from nemo_star.models.guard import ACCEPTED, check_core_attention

SETTINGS = {
    "attention_dropout": 0.1,
    "apply_query_key_layer_scaling": True,
    "qk_clip": True,
    "fp8_dot_product_attention": True,
}
"""Fields of this Megatron's TransformerConfig that one may set by themselves."""


def config(**settings):
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "cuda_graph_scope": []}
    return TransformerConfig(**sizes, use_cpu_initialization=True, **{"attention_dropout": 0.0, **settings})


@pytest.fixture
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
    with pytest.raises(ValueError, match=r"attention_dropout=0.1.*qk_clip=True"):
        star_layer_spec(config(qk_clip=True, attention_dropout=0.1), state)


@pytest.mark.parametrize("window", [(64, 64), (-1, 0)])
def test_a_window_that_is_none_is_refused(state, window):
    with pytest.raises(ValueError, match="window_size=.* is not supported: a window is"):
        star_layer_spec(config(window_size=window), state)


def test_windows_and_sinks_are_taken_by_methods_that_have_them(state):
    settings = config(window_size=(7, 0), window_attn_skip_freq=[1, 0], softmax_type="learnable")
    assert not state.method.in_rounds
    spec = star_layer_spec(settings, state)
    assert state.method.in_rounds
    core = spec.submodules.self_attention.submodules.core_attention
    layers = [core(settings, number) for number in (1, 2)]
    assert [layer.window for layer in layers] == [8, None]
    assert [layer.softmax_offset.shape for layer in layers] == [(4,), (4,)]
    state.method = SlidingWindow(AttentionConfig())
    with pytest.raises(ValueError, match="toy_method.SlidingWindow does not take models with windowed layers or sinks"):
        star_layer_spec(settings, state)
