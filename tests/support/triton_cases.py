"""What the Triton kernels are tried on, against float64: in Triton's interpreter on CPU, and on a GPU.

A case is called with a device and the type of queries; it raises an AssertionError.
"""

from __future__ import annotations

import functools

import torch
from oracle import reference

from nemo_star.attention.cache import KVCache
from nemo_star.kernels.merge import merge_by_triton
from nemo_star.kernels.triton_decode import attend
from nemo_star.kernels.triton_kernel import TritonKernel

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of out, whose values are below 4: weights are rounded to the query's type, which has 11 or 8 binary digits."""
SHAPES = {
    "one key": (1, 1, 4, 2, 64, 1, True),
    "a token, head dimension 80": (1, 37, 4, 4, 80, 1, True),
    "two tokens, batch 2": (2, 300, 6, 2, 64, 2, True),
    "three stretches": (3, 1100, 4, 1, 128, 1, True),
    "four tokens of four": (4, 4, 2, 1, 128, 1, True),
    "five tokens": (5, 300, 16, 2, 80, 1, True),
    "keys of others": (5, 37, 4, 2, 64, 1, False),
    "head dimension 24": (2, 64, 4, 2, 24, 1, True),
    "head dimension 256": (1, 70, 2, 1, 256, 1, True),
}
"""(sq, sk, np, ng, hn, b, causal)."""
NARROW = {"a token, head dimension 80", "three stretches", "five tokens", "keys of others"}
MERGED = {1: (2, 1, 2, 16), 2: (3, 2, 4, 64), 5: (1, 1, 3, 80), 40: (1, 1, 2, 128)}
"""(sq, b, np, hn) by number of partial results."""


def inputs(shape, dtype, device, stored=None):
    """q as a part of a larger tensor, k and v as a cache has them."""
    sq, sk, heads, groups, channels, b, _ = shape
    generator = torch.Generator().manual_seed(sq * 1000 + sk)
    q = torch.randn(sq, b, heads, 2, channels, generator=generator).to(device, dtype)[:, :, :, 0]
    cache = KVCache(capacity=sk + 5)
    k, v = (torch.randn(sk, b, groups, channels, generator=generator).to(device, stored or dtype) for _ in range(2))
    cache.append(1, k, v)
    return q, *cache.get(1)


def decode(shape, stored, device, dtype):
    q, k, v = inputs(shape, dtype, device, stored)
    # A GPU has many processors, which would get few keys each; the interpreter runs one program after the other.
    check(TritonKernel(programs=None if device.type == "cuda" else 6), q, k, v, shape[-1])


def decode_with_e4m3(device, dtype):
    """By the conversion of a GPU that has the type, which the interpreter has, too."""
    q, k, v = inputs(SHAPES["two tokens, batch 2"], dtype, device, E4M3)
    convert = functools.partial(attend, causal=True, programs=1)
    for left, right in zip(convert(q, k, v, 0.1, has_e4m3=True), convert(q, k, v, 0.1), strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def long_query_over_float8(device, dtype):
    """68 rows a group: two tiles, each with a mask of its own."""
    shape = (17, 40, 4, 1, 64, 1, True)
    check(TritonKernel(programs=2), *inputs(shape, dtype, device, E4M3), True)


def check(kernel, q, k, v, causal):
    scale = q.shape[-1] ** -0.5
    out, lse = kernel.decode(q, k, v, scale, causal)
    assert out.dtype == lse.dtype == torch.float32
    expected_out, expected_lse = reference(q.cpu(), k.cpu().float(), v.cpu().float(), scale, causal)
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.cpu().double(), expected_out, atol=tolerance, rtol=tolerance)
    check_lse(lse, expected_lse)


def check_lse(lse, expected):
    tolerance = 1e-5 if lse.device.type == "cpu" else 1e-4  # a GPU's exponentials and logarithms are approximate
    torch.testing.assert_close(lse.cpu().double(), expected, atol=tolerance, rtol=tolerance)


def no_keys(device, dtype):
    q, k, v = inputs((3, 1, 4, 2, 64, 1, False), dtype, device)
    out, lse = TritonKernel().decode(q, k[:0], v[:0], 0.1, False)
    assert not out.any()
    assert lse.isneginf().all()


def every_byte(stored, native, device, dtype):
    """Over one key attention is its value: the 256 numbers of a type, infinity and nan among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 4, 64).to(device)
    values = codes.view(stored)
    q, k = torch.zeros(1, 1, 4, 64, dtype=dtype, device=device), torch.zeros_like(codes).view(stored)
    out, _ = attend(q, k, values, 1.0, causal=True, programs=1, has_e4m3=native)
    expected = values.cpu().float()
    known = ~expected.isnan() if native and device.type == "cpu" else slice(None)  # the interpreter's e4m3 has no nan
    torch.testing.assert_close(out.cpu()[known], expected[known], rtol=0, atol=0, equal_nan=True)


def broken_numbers_stay(device, dtype):
    """A nan in a key or a value is not passed over."""
    for which in (1, 2):
        tensors = list(inputs((1, 70, 2, 1, 64, 1, True), dtype, device))
        tensors[which][40, 0, 0, 3] = float("nan")
        out, lse = TritonKernel(programs=1).decode(*tensors, 0.1, True)
        assert out[..., 3].isnan().all()
        assert lse.isnan().all() == (which == 1)


def merged(partials, with_sinks, device, dtype):
    """As it arrives from other ranks: out and lse in one buffer. Some hold no keys, and nan or anything in its place;
    the last row none at all."""
    sq, b, heads, channels = MERGED[partials]
    generator = torch.Generator().manual_seed(partials)
    gathered = torch.randn(partials, sq, b, heads, channels + 1, generator=generator) * 3
    gathered[..., -1] *= 30
    if partials > 1:
        gathered[0, 0, 0, 0, -1] = gathered[-1, :, :, 0, -1] = float("-inf")
        gathered[0, 0, 0, 0, :-1] = float("nan")
    gathered[:, -1, -1, -1, -1] = float("-inf")
    sinks = torch.tensor([0.5, -20.0, 90.0, 3.0])[:heads].to(device, dtype) if with_sinks else None
    gathered = gathered.to(device)
    out, lse = merge_by_triton(gathered[..., :-1], gathered[..., -1], sinks, dtype)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    expected_out, expected_lse = merged_exactly(gathered.cpu().double(), None if sinks is None else sinks.cpu())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.cpu().double(), expected_out, atol=tolerance, rtol=tolerance)
    check_lse(lse, expected_lse)


def merged_exactly(gathered, sinks):
    """In float64, as one softmax over the partial results, and a sink beside them."""
    outs, lses = gathered[..., :-1], gathered[..., -1]
    beside = torch.full_like(lses[:1], float("-inf")) if sinks is None else sinks.double().expand_as(lses[:1])
    weights = torch.cat((lses, beside)).softmax(0)[:-1].nan_to_num(0.0)
    return (weights[..., None] * outs.nan_to_num(0.0)).sum(0), lses.logsumexp(0)


def far_apart(device, dtype):
    """No gap between partial results overflows."""
    outs = torch.ones(2, 1, 1, 1, 16, device=device).cumsum(0)
    for gap in (-1000.0, 1000.0):
        lses = torch.tensor([0.0, gap], device=device).view(2, 1, 1, 1)
        out, lse = merge_by_triton(outs, lses, None, dtype)
        assert torch.equal(out, torch.full_like(out, 1.0 if gap < 0 else 2.0))
        assert lse.item() == max(0.0, gap)


CASES = {
    **{name: functools.partial(decode, shape, None) for name, shape in SHAPES.items()},
    **{f"e4m3, {name}": functools.partial(decode, SHAPES[name], E4M3) for name in sorted(NARROW)},
    **{f"e5m2, {name}": functools.partial(decode, SHAPES[name], E5M2) for name in sorted(NARROW)},
    "e4m3 of the device": decode_with_e4m3,
    "long query over float8": long_query_over_float8,
    "no keys": no_keys,
    "every byte of e4m3": functools.partial(every_byte, E4M3, False),
    "every byte of e4m3 by the device": functools.partial(every_byte, E4M3, True),
    "every byte of e5m2": functools.partial(every_byte, E5M2, False),
    "broken numbers": broken_numbers_stay,
    **{f"merge of {partials}": functools.partial(merged, partials, False) for partials in MERGED},
    **{f"merge of {partials} with sinks": functools.partial(merged, partials, True) for partials in MERGED},
    "merge of what is far apart": far_apart,
}
