"""Weights of Transformer Engine's modules through torch's functions."""

from types import SimpleNamespace

import pytest
import torch

from nemo_star.models.te_weights import bias_of, rms_norm


@pytest.mark.parametrize("zero_centred", [False, True])
def test_a_weight_in_16_bits_is_added_to_in_32(zero_centred):
    """1 + 0.003 in bfloat16 would be 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 256, generator=generator)
    weight = (0.003 * torch.randn(256, generator=generator)).bfloat16()
    config = SimpleNamespace(layernorm_epsilon=1e-6, layernorm_zero_centered_gamma=zero_centred)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = exact * (weight.double() + (1.0 if zero_centred else 0.0))
    found = rms_norm(x, weight if zero_centred else weight.float(), config)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-7)


def test_an_empty_bias_is_none():
    assert bias_of(SimpleNamespace(bias=None)) is None
    assert bias_of(SimpleNamespace(bias=torch.empty(0))) is None
    assert bias_of(SimpleNamespace(bias=torch.ones(2))).tolist() == [1, 1]
