"""Products of a few rows on CPU by Numba's code, against float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from nemo_star.kernels import few_rows

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Weights of any size, and a processor that has no products of 16 bits."""
    monkeypatch.setattr(few_rows, "MIN_NUMBERS", 1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def operands(rows, width, out, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, width), (out, width), (out,))]


def check(x, weight, bias=None):
    assert few_rows.takes(x, weight)
    found = few_rows.linear(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS])
def test_it_multiplies(dtype):
    more = [(50, 48, 20)] if dtype != torch.float32 else []
    for rows, width, out in (*more, (3, 16, 8), (5, 48, 9), (8, 272, 23), (11, 528, 64), (16, 1024, 17)):
        x, weight, bias = operands(rows, width, out, dtype)
        check(x, weight)
        if dtype == torch.float32:  # in 16 bits the product is rounded before
            check(x, weight, bias)


def test_leading_dimensions_stay():
    x, weight, bias = operands(12, 32, 24)
    found = few_rows.linear(x.view(4, 3, 32), weight, bias)
    torch.testing.assert_close(found, F.linear(x, weight, bias).view(4, 3, 24))


def test_threads_divide_the_weight(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(few_rows, "free_cores", lambda: 3)
    with torch.inference_mode():  # which other threads are not in
        check(*operands(6, 64, 50))
    assert not few_rows.takes(*operands(6, 64, 23)[:2])  # less than eight rows for each


def test_what_is_no_number_shows():
    x, weight, _ = operands(4, 64, 16)
    x[1, 5] = math.nan
    found = few_rows.linear(x, weight)
    assert found[1].isnan().all()
    assert found[[0, 2, 3]].isfinite().all()


def test_what_it_does_not_take_goes_to_torch(monkeypatch):
    x, weight, bias = operands(4, 64, 16)
    other = [
        (x[:2], weight),  # torch is as fast
        (x.repeat(5, 1), weight),  # matrix products
        (x[:, :24], weight[:, :24].clone()),
        (x[:, :32], weight[:, :32]),
        (x.double(), weight.double()),
        (x, weight[:7]),
    ]
    for given in other:
        assert not few_rows.takes(*given)
        assert torch.equal(few_rows.linear(*given), F.linear(*given))
    assert few_rows.takes(x.bfloat16(), weight.bfloat16())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not few_rows.takes(x.bfloat16(), weight.bfloat16())
    assert few_rows.takes(x, weight)
    monkeypatch.setattr(few_rows, "is_installed", lambda: False)
    assert torch.equal(few_rows.linear(x, weight, bias), F.linear(x, weight, bias))
