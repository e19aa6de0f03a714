"""Our calls of Transformer Engine, made on a stand-in: right on numbers, and fitting every recorded release.

tests/data/te_signatures.json is written by tools/te_signatures.py from the releases' own sources.
"""

import os
import sys

import pytest
import torch
from launch import ROOT
from oracle import SHAPES, inputs, reference
from te_releases import RELEASES, signature

from nemo_star.kernels import settle as settling
from nemo_star.kernels.settle import Heads, names, settle
from nemo_star.kernels.te import KEPT_OFFSETS, TEKernel
from nemo_star.kernels.torch_flash import FlashKernel


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


def test_tensors_that_begin_within_others_do(stand_in):
    q, k, v = (x[1:] for x in inputs(41, 60, heads=4, groups=2))
    prefill = TEKernel().prefill(q, k, v, 0.3)
    torch.testing.assert_close(prefill.double(), reference(q, k, v, 0.3, True)[0], atol=1e-5, rtol=1e-5)


def test_keys_are_not_repeated_for_a_group(stand_in):
    q, k, v = inputs(1, 40, heads=4, groups=2)
    TEKernel().decode(q, k, v, 0.3, True)
    (call,) = stand_in
    assert call[2]["k"].data_ptr() == k.data_ptr()
    assert call[2]["q"].shape == (2, 1, 2, 16)


def test_offsets_are_made_once_for_all_layers_and_not_kept_for_ever(stand_in):
    kernel = TEKernel()
    for keys in (40, 40, *range(41, 42 + KEPT_OFFSETS)):
        kernel.decode(*inputs(1, keys), 0.3, True)
    first, second = (call[2]["cu_seqlens_kv"] for call in stand_in[:2])
    assert first is second
    assert first.tolist() == [0, 40]
    assert len(kernel._offsets) <= KEPT_OFFSETS


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


CPU = torch.device("cpu")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The choice of kernels as on a GPU with Transformer Engine; what torch's flash attention would be asked for."""
    asked = []

    def flash(q, k, v, scale, causal, window=None):
        asked.append((q.shape[0], k.shape[0]))
        out, lse = reference(q, k, v, scale, causal, window)
        return out.to(q.dtype), lse.float()

    monkeypatch.setattr(settling, "kernels_that_run", lambda device, dtype: ["te", "flash", "math"])
    monkeypatch.setattr("nemo_star.kernels.torch_flash._cuda_flash", flash)
    return asked


def refuse(monkeypatch, refused):
    """Transformer Engine finds no backend for calls (q, k, mask) that `refused` says; it raises, as it does since 2.9
    (dot_product_attention.py, line 1371) where NVTE_UNFUSED_ATTN=0 leaves it nothing."""
    from transformer_engine.pytorch import DotProductAttention

    forward = DotProductAttention.forward

    def looked_at(self, q, k, v, **keywords):
        if refused(q, k, keywords["attn_mask_type"]):
            raise ValueError("No dot product attention backend is available for the provided inputs.\nMore.")
        return forward(self, q, k, v, **keywords)

    monkeypatch.setattr(DotProductAttention, "forward", looked_at)


def test_no_token_of_decode_reaches_it(stand_in, as_on_a_gpu):
    """Each would be a plan of cuDNN: K is one longer every time."""
    kernel, told = settle(TEKernel(), Heads(4, 2, 16), CPU, torch.bfloat16, decode=True)
    assert told is None
    for sk in range(40, 45):
        q, k, v = inputs(1, sk)
        out, _ = kernel.decode(q, k, v, 0.3, True)
        torch.testing.assert_close(out.double(), reference(q, k, v, 0.3, True)[0], atol=1e-5, rtol=1e-5)
    assert stand_in == []
    assert as_on_a_gpu == [(1, sk) for sk in range(40, 45)]


def test_prefill_stays_its_own(stand_in, as_on_a_gpu):
    kernel = TEKernel()
    prefill, told = settle(kernel, Heads(4, 2, 16, window=7), CPU, torch.bfloat16, decode=False)
    assert (prefill, told) == (kernel, None)
    windows = {call[2]["window_size"] for call in stand_in if call[0] == "DotProductAttention.forward"}
    assert windows == {(-1, 0), (6, 0)}
    assert names(prefill, FlashKernel()) == "prefill te, decode flash"
    assert names(prefill, prefill) == "te"


@pytest.mark.parametrize("channels", [264, 320])
def test_decode_is_its_own_where_flash_takes_no_such_heads(stand_in, as_on_a_gpu, channels):
    """cuDNN from 9.10.2 on has any head dimension, on some GPUs (fused_attn.cpp, line 328)."""
    kernel = TEKernel()
    assert settle(kernel, Heads(4, 2, channels), CPU, torch.bfloat16, decode=True) == (kernel, None)
    assert {name for name, *_ in stand_in} >= {"DotProductAttention.forward", "fused_attn_fwd"}
    assert as_on_a_gpu == []


def test_decode_is_its_own_in_a_torch_without_flash_attention(stand_in, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(settling, "kernels_that_run", lambda device, dtype: ["te", "math"])
    kernel = TEKernel()
    assert settle(kernel, Heads(4, 2, 16), CPU, torch.bfloat16, decode=True) == (kernel, None)


@pytest.mark.parametrize(("channels", "instead"), [(16, "flash"), (264, "math")])
def test_without_a_fused_backend_another_kernel_is_taken_and_named(
    stand_in, as_on_a_gpu, monkeypatch, channels, instead
):
    """cuDNN before 9.7: a mask that is aligned to the bottom right wants lengths in multiples of 64."""
    refuse(monkeypatch, lambda q, k, mask: mask == "causal_bottom_right" and (q.shape[0] % 64 or k.shape[0] % 64))
    for decode in (False, True) if instead == "math" else (False,):
        kernel, told = settle(TEKernel(), Heads(4, 2, channels), CPU, torch.bfloat16, decode=decode)
        assert kernel.name == instead
        assert told.startswith(
            "attention.kernel=te does not take this model (ValueError: No dot product attention backend is available "
            f"for the provided inputs.): {instead} instead"
        )
    q, k, v = inputs(5, 64)
    torch.testing.assert_close(
        kernel.prefill(q, k, v, 0.3).double(), reference(q, k, v, 0.3, True)[0], atol=1e-5, rtol=0
    )


def test_flash_with_heads_that_it_does_not_take_is_math(as_on_a_gpu):
    kernel, told = settle(FlashKernel(), Heads(4, 2, 20), CPU, torch.bfloat16, decode=True)
    assert kernel.name == "math"
    assert "its heads have 20 dimensions" in told
    kernel = FlashKernel()
    assert settle(kernel, Heads(4, 2, 24), CPU, torch.bfloat16, decode=True) == (kernel, None)


@pytest.mark.parametrize("before", [None, "1"])
def test_the_users_setting_of_unfused_attention_comes_back(stand_in, monkeypatch, before):
    monkeypatch.delenv("NVTE_UNFUSED_ATTN", raising=False)
    if before:
        monkeypatch.setenv("NVTE_UNFUSED_ATTN", before)
    TEKernel().prefill(*inputs(4, 8), 0.3)
    refuse(monkeypatch, lambda *_: True)
    with pytest.raises(ValueError, match="No dot product attention backend"):
        TEKernel().prefill(*inputs(4, 8), 0.3)
    assert os.environ.get("NVTE_UNFUSED_ATTN") == before


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
