"""Merge and kernels against plain float64 attention."""

import pytest
import torch
from oracle import SHAPES, inputs, reference

from nemo_star.commands import doctor
from nemo_star.kernels import registry
from nemo_star.kernels.math import MathKernel, attend_at
from nemo_star.kernels.merge import merge_partials
from nemo_star.kernels.registry import get_kernel
from nemo_star.runtime.transformer_engine import find_transformer_engine


def kernels(dtype=torch.float32):
    return [get_kernel(name, torch.device("cpu"), dtype) for name in ("cpu", "math")]


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("sq", "sk"), SHAPES)
def test_kernels_compute_attention(kernel, heads, groups, batch, sq, sk):
    q, k, v = inputs(sq, sk, heads, groups, batch)
    for causal in (True, False):
        out, lse = kernel.decode(q, k, v, 0.3, causal)
        expected_out, expected_lse = reference(q, k, v, 0.3, causal)
        torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
        assert out.dtype == lse.dtype == torch.float32
    prefill = kernel.prefill(q, k, v, 0.3)
    torch.testing.assert_close(prefill.double(), reference(q, k, v, 0.3, True)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("window", [1, 7, 40, 300, 900])
@pytest.mark.parametrize(("sq", "past"), [(1, 0), (1, 90), (5, 3), (64, 0), (256, 39), (300, 6), (600, 299)])
def test_kernels_compute_attention_within_a_window(kernel, batch, window, sq, past):
    q, k, v = inputs(sq, sq + past, batch=batch)
    out, lse = kernel.decode(q, k, v, 0.3, True, window)
    expected_out, expected_lse = reference(q, k, v, 0.3, True, window)
    torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(kernel.prefill(q, k, v, 0.3, window).double(), expected_out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("sq", "sk", "causal"), [(64, 64, True), (33, 97, True), (64, 80, False)])
def test_the_math_kernel_never_has_more_scores_than_it_may(monkeypatch, rows, window, sq, sk, causal):
    q, k, v = inputs(sq, sk, batch=2)
    window = window if causal else None
    most = rows * 2 * 4 * sk
    sizes = []
    softmax = torch.logsumexp
    monkeypatch.setattr(torch, "logsumexp", lambda x, **keywords: (sizes.append(x.numel()), softmax(x, **keywords))[1])
    out, lse = MathKernel(max_scores=most).decode(q, k, v, 0.3, causal, window)
    assert max(sizes) <= most
    assert len(sizes) == -(-sq // rows)
    expected_out, expected_lse = reference(q, k, v, 0.3, causal, window)
    torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    assert MathKernel(max_scores=most).prefill(q[:0], k, v, 0.3).shape == (0, 2, 4, 16)


@pytest.mark.parametrize("window", [3, 50])
def test_attention_by_position(window):
    """Queries 100 to 399 over the keys of every third position before them and among them."""
    positions = torch.arange(1, 400, 3)
    q, k, v = inputs(300, 400)
    q, mine, values = q, k[positions], v[positions]
    out, lse = attend_at(q, mine, values, 0.3, first=100, positions=positions, window=window)
    for row in (0, 1, 2, 127, 128, 299):
        seen = positions[(positions <= 100 + row) & (positions > 100 + row - window)]
        expected = reference(q[row : row + 1], k[seen], v[seen], 0.3, False)
        torch.testing.assert_close(out[row : row + 1].double(), expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[row : row + 1].double(), expected[1], atol=1e-5, rtol=1e-5)
    out, lse = attend_at(q, mine[:5], values[:5], 0.3, first=100, positions=positions[:5], window=window)
    assert torch.equal(out[-1], torch.zeros_like(out[-1]))
    assert torch.equal(lse[-1], torch.full_like(lse[-1], float("-inf")))


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_no_keys_give_no_share(kernel):
    q, k, v = inputs(3, 0)
    out, lse = kernel.decode(q, k, v, 0.3, False)
    assert torch.equal(out, torch.zeros(3, 1, 4, 16))
    assert torch.equal(lse, torch.full((3, 1, 4), float("-inf")))


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_views_of_a_larger_buffer_do(kernel):
    q, k, v = inputs(5, 64)
    views = k[8:40], v[8:40]
    copies = k[8:40].clone(), v[8:40].clone()
    torch.testing.assert_close(kernel.decode(q, *views, 0.3, True), kernel.decode(q, *copies, 0.3, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(3, 1, 40), (5, 0, 2), (0, 0), (17, 17, 17)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_a_token_of_each_of_several_sequences(lengths, heads, groups, dtype):
    """Some rank may hold no key of a sequence, and no number that lies behind another's keys enters."""
    kernel = get_kernel("cpu", torch.device("cpu"), dtype)
    each = [inputs(1, length, heads, groups, dtype=dtype, seed=seed) for seed, length in enumerate(lengths)]
    q = torch.stack([q[0, 0] for q, _, _ in each])
    keys, values = ([tensors[which][:, 0] for tensors in each] for which in (1, 2))
    out, lse = kernel.decode_ragged(q, keys, values, 0.3)
    assert out.dtype == lse.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for row, (q, k, v) in enumerate(each):
        if not len(k):
            assert not out[row].any()
            assert lse[row].isneginf().all()
            continue
        expected_out, expected_lse = reference(q, k, v, 0.3, False)
        torch.testing.assert_close(out[row].double(), expected_out[0, 0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse[row].double(), expected_lse[0, 0], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_is_as_good_as_torch(causal):
    """At most twice the error of torch's own bfloat16 attention against float32."""
    q, k, v = inputs(64, 64, groups=4, dtype=torch.bfloat16)
    exact = reference(q, k, v, 0.25, causal)[0]
    batch_first = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
    own = torch.nn.functional.scaled_dot_product_attention(*batch_first, is_causal=causal, scale=0.25)
    allowed = 2 * (own.permute(2, 0, 1, 3).double() - exact).abs().max()
    for kernel in kernels(torch.bfloat16):
        assert (kernel.decode(q, k, v, 0.25, causal)[0].double() - exact).abs().max() <= allowed


def test_a_kernel_that_cannot_run_is_refused_with_those_that_can():
    with pytest.raises(ValueError, match=r"attention.kernel=flash does not run on cpu .*: numba, cpu, math"):
        get_kernel("flash", torch.device("cpu"), torch.float32)
    assert get_kernel("auto", torch.device("cpu"), torch.float32).name == "numba"


@pytest.mark.parametrize(
    ("dtype", "capability", "loaded", "built", "expected"),
    [
        (torch.bfloat16, (9, 0), True, True, ["te", "flash", "math"]),
        (torch.float16, (8, 0), False, True, ["flash", "math"]),
        (torch.float16, (8, 0), True, False, ["te", "math"]),
        (torch.bfloat16, (7, 5), False, True, ["math"]),
        (torch.float32, (9, 0), True, True, ["math"]),
    ],
)
def test_on_cuda_auto_takes_the_first_that_runs(monkeypatch, dtype, capability, loaded, built, expected):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(registry, "is_loaded", lambda: loaded)
    monkeypatch.setattr(registry, "has_triton", lambda: False)  # test_triton.py has it
    device = torch.device("cuda")
    assert registry.kernels_that_run(device, dtype) == expected
    assert get_kernel("auto", device, dtype).name == expected[0]


def test_the_doctor_names_the_kernels_of_prefill_and_decode(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(registry, "is_loaded", lambda: True)
    monkeypatch.setattr(registry, "has_triton", lambda: True)
    assert "in bfloat16: attention kernel prefill te, decode flash (also: flash, triton, math)" in doctor._choice().text
    monkeypatch.setattr(registry, "is_loaded", lambda: False)
    monkeypatch.setattr(registry, "has_triton", lambda: False)
    assert "in bfloat16: attention kernel flash (also: math)" in doctor._choice().text


def test_why_transformer_engine_does_not_run_is_said():
    why = r"attention.kernel=te does not run on cpu .* \(Transformer Engine is not installed\); these do: numba, cpu"
    if find_transformer_engine().state == "absent":
        with pytest.raises(ValueError, match=why):
            get_kernel("te", torch.device("cpu"), torch.bfloat16)


def test_merge_of_parts_is_attention_over_all_keys():
    q, k, v = inputs(6, 90)
    kernel = get_kernel("math", q.device, q.dtype)
    parts = [kernel.decode(q, k[start:stop], v[start:stop], 0.3, False) for start, stop in ((0, 50), (50, 90))]
    out, lse = merge_partials(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))
    expected_out, expected_lse = reference(q, k, v, 0.3, False)
    torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gap", [-100.0, 100.0, -1000.0, 1000.0])
def test_merge_survives_any_gap(gap):
    outs = torch.stack([torch.full((1, 1, 1, 4), 1.0), torch.full((1, 1, 1, 4), 2.0)])
    out, lse = merge_partials(outs, torch.tensor([0.0, gap]).view(2, 1, 1, 1))
    assert torch.equal(out, torch.full((1, 1, 1, 4), 1.0 if gap < 0 else 2.0))
    assert lse.item() == max(0.0, gap)


def test_merge_with_empty_parts():
    empty = torch.tensor(float("-inf"))
    outs = torch.stack([torch.full((1, 1, 1, 4), float("nan")), torch.full((1, 1, 1, 4), 2.0)])
    out, lse = merge_partials(outs, torch.stack([empty, torch.tensor(3.0)]).view(2, 1, 1, 1))
    assert torch.equal(out, torch.full((1, 1, 1, 4), 2.0))
    assert lse.item() == 3.0
    out, lse = merge_partials(outs, torch.stack([empty, empty]).view(2, 1, 1, 1))
    assert torch.equal(out, torch.zeros(1, 1, 1, 4))
    assert lse.item() == float("-inf")
