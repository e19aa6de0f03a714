"""Our calls of Transformer Engine, made on a stand-in: right on numbers, and fitting every recorded release.

tests/data/te_signatures.json is written by tools/te_signatures.py from the releases' own sources.
"""

import sys

import pytest
import torch
from launch import ROOT
from oracle import SHAPES, inputs, reference
from te_releases import RELEASES, signature

from nemo_star.kernels.te import TEKernel


@pytest.fixture
def stand_in(monkeypatch):
    """tests/fake_transformer_engine in place of any Transformer Engine; its list of calls."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(ROOT / "tests/fake_transformer_engine")
    from transformer_engine.pytorch.calls import CALLS

    yield CALLS
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("sq", "sk"), SHAPES)
def test_what_is_asked_of_transformer_engine_is_attention(stand_in, heads, groups, batch, sq, sk):
    kernel = TEKernel()
    q, k, v = inputs(sq, sk, heads, groups, batch)
    for causal in (True, False):
        out, lse = kernel.decode(q, k, v, 0.3, causal)
        expected_out, expected_lse = reference(q, k, v, 0.3, causal)
        torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
        assert out.dtype == lse.dtype == torch.float32
    prefill = kernel.prefill(q, k, v, 0.3)
    torch.testing.assert_close(prefill.double(), reference(q, k, v, 0.3, True)[0], atol=1e-5, rtol=1e-5)


def test_keys_are_not_repeated_for_a_group(stand_in):
    q, k, v = inputs(1, 40, heads=4, groups=2)
    TEKernel().decode(q, k, v, 0.3, True)
    (call,) = stand_in
    assert call[2]["k"].data_ptr() == k.data_ptr()
    assert call[2]["q"].shape == (2, 1, 2, 16)


def test_views_of_a_larger_buffer_do(stand_in):
    q, k, v = inputs(5, 64)
    batch_of_two = torch.stack((k, v)).transpose(0, 1)  # dense neither in tokens nor in heads
    views = batch_of_two[8:40, 0], batch_of_two[8:40, 1]
    copies = k[8:40].clone(), v[8:40].clone()
    torch.testing.assert_close(TEKernel().decode(q, *views, 0.3, True), TEKernel().decode(q, *copies, 0.3, True))


def test_no_keys_never_reach_it(stand_in):
    q, k, v = inputs(3, 0)
    out, lse = TEKernel().decode(q, k, v, 0.3, False)
    assert not out.any()
    assert lse.isneginf().all()
    assert stand_in == []


def test_one_module_serves_all_layers(stand_in):
    kernel = TEKernel()
    for _ in range(3):
        kernel.prefill(*inputs(4, 8), 0.3)
    assert [name for name, *_ in stand_in].count("DotProductAttention.__init__") == 1


@pytest.mark.parametrize("release", RELEASES)
def test_our_calls_fit_a_release(stand_in, release):
    """Every call that prefill and decode make binds to the release's signature, in words that it knows."""
    recorded = RELEASES[release]
    kernel = TEKernel()
    for sq, sk in SHAPES:
        kernel.prefill(*inputs(sq, sk), 0.3)
        kernel.decode(*inputs(sq, sk), 0.3, True)
    assert {name for name, *_ in stand_in} == {
        "DotProductAttention.__init__",
        "DotProductAttention.forward",
        "fused_attn_fwd",
    }
    for name, args, keywords in stand_in:
        signature(recorded[name]).bind(*args, **keywords)
        assert keywords.get("attn_mask_type", "no_mask") in recorded["AttnMaskTypes"]
        if name == "fused_attn_fwd":
            assert keywords["attn_mask_type"] in recorded["AttnMaskType"]
            assert keywords["attn_bias_type"] in recorded["AttnBiasType"]
            assert keywords["qkv_layout"] in recorded["QKVLayout"]
    assert "F16_arbitrary_seqlen" in recorded["FusedAttnBackend"]


def test_the_signatures_are_those_of_the_supported_range():
    minors = sorted(tuple(int(part) for part in release.split(".")[:2]) for release in RELEASES)
    assert minors[0] == (2, 9)
    assert minors[-1] >= (2, 20)
    assert len(minors) >= 6
