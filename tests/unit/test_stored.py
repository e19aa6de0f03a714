"""K/V in fp8: what is written, what a kernel is given of it, who reads it as it is, what is refused."""

import math

import pytest
import torch
from oracle import inputs, reference

from nemo_star import LLM
from nemo_star.attention.cache import KVCache
from nemo_star.benchmarking.probe import time_cache_reads
from nemo_star.kernels import stored
from nemo_star.kernels.math import MathKernel
from nemo_star.kernels.numba_kernel import NumbaKernel, takes
from nemo_star.kernels.stored import attend_stored, stored_name, stored_type
from nemo_star.kernels.torch_cpu import TorchCpuKernel

FORMATS = {"fp8_e4m3": (4, 3, 7, 448.0), "fp8_e5m2": (5, 2, 15, 57344.0)}
"""Name -> bits of exponent and mantissa, bias, largest value (OCP OFP8, table 2)."""


def values_of(name):
    """The type's values from 0 up, float64: subnormals first."""
    exponents, mantissas, bias, most = FORMATS[name]
    found = []
    for exponent in range(2**exponents):
        for mantissa in range(2**mantissas):
            part = mantissa / 2**mantissas
            found.append(part * 2.0 ** (1 - bias) if exponent == 0 else (1 + part) * 2.0 ** (exponent - bias))
    return [value for value in found if value <= most]


def nearest(x, name):
    """Written for clarity: the nearest value, of two the one with an even last bit; the largest beyond it."""
    values = torch.tensor(values_of(name), dtype=torch.float64)
    apart = (values - x.double().abs().nan_to_num(posinf=1e9).clamp(max=values[-1])[:, None]).abs()
    first = apart.argmin(dim=1)
    second = (first + 1).clamp(max=len(values) - 1)
    tie = apart.gather(1, second[:, None])[:, 0] == apart.amin(dim=1)
    found = values[torch.where(tie & (first % 2 == 1), second, first)].copysign(x.double())
    return torch.where(x.isnan(), torch.nan, found)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("written", [torch.bfloat16, torch.float16])
def test_every_value_is_written_as_the_nearest(name, written):
    """All bit patterns: subnormals, what is too small, what is beyond the largest value, infinities, nan."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(written).reshape(-1, 1, 1, 16)
    cache = KVCache(stored_type(name))
    cache.append(1, x, -x)
    k, v = (held.double().flatten() for held in cache.get(1))
    torch.testing.assert_close(k, nearest(x.flatten(), name), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(v, -k, rtol=0, atol=0, equal_nan=True)
    assert k.nan_to_num().abs().max() == FORMATS[name][-1]
    assert k.isnan().sum() == x.isnan().sum() > 0
    assert cache.nbytes == 2**17


def test_what_is_moved_is_not_rounded_again():
    """Growing, copying, rolling back, becoming a context's: the same bits, nan too."""
    first, more = (torch.randn(5, 1, 2, 16, generator=torch.Generator().manual_seed(seed)) * 300 for seed in (1, 2))
    first[0, 0, 0, 0] = torch.nan
    cache = KVCache(torch.float8_e4m3fn)
    cache.append(1, first, first)
    bits = cache.get(1)[0].view(torch.uint8).clone()
    cache.append(1, more, more)
    other = KVCache(torch.float8_e4m3fn, capacity=3)
    other.extend(cache.copy(), less=5)
    cache.truncate(5)
    for each in (cache, other):
        assert torch.equal(each.get(1)[1].view(torch.uint8), bits)
    assert cache.get(1)[0].abs().float().nan_to_num().max() == 448


class Noting:
    """A kernel, and the keys of its calls: shape, type, whether its own are the last ones."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []
        self.name = kernel.name

    def decode(self, q, k, v, scale, causal, window=None):
        assert k.dtype == v.dtype
        self.calls.append((k.shape[0], k.dtype, causal))
        return self.kernel.decode(q, k, v, scale, causal, window)


def cached(k, v, name="fp8_e4m3"):
    cache = KVCache(stored_type(name), capacity=k.shape[0] + 3)  # views with gaps, as of a context that goes on
    cache.append(1, k, v)
    return cache.get(1)


@pytest.mark.parametrize("kernel", [MathKernel, TorchCpuKernel, NumbaKernel])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (1, 40), (3, 40), (7, 7), (33, 97), (20, 31)])
def test_pieces_are_merged_to_attention_over_all(monkeypatch, kernel, causal, sq, sk):
    """Ten tokens in float32 at once, or the queries' own where they are more."""
    monkeypatch.setitem(stored.PIECE_BYTES, "cpu", 10 * 2 * 2 * 16 * 4)
    q, k, v = inputs(sq, sk)
    kept = cached(k, v)
    noting = Noting(kernel())
    out, lse = attend_stored(noting, q, *kept, 0.3, causal)
    right = reference(q, *(x.double() for x in kept), 0.3, causal)
    torch.testing.assert_close(out.double(), right[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), right[1], atol=1e-5, rtol=0)
    assert out.dtype == lse.dtype == torch.float32
    own = sq if causal else 0
    assert sum(tokens for tokens, *_ in noting.calls) == sk
    assert max(tokens for tokens, *_ in noting.calls) <= max(10, own)
    assert [said for *_, said in noting.calls] == [False] * (len(noting.calls) - 1) + [causal]
    assert {dtype for _, dtype, _ in noting.calls} == {torch.float32}


def test_a_short_cache_is_one_piece_and_an_empty_one_none():
    q, k, v = inputs(2, 50)
    noting = Noting(MathKernel())
    attend_stored(noting, q, *cached(k, v), 1.0, False)
    assert [tokens for tokens, *_ in noting.calls] == [50]
    out, lse = attend_stored(noting, q, *(x[:0] for x in cached(k, v)), 1.0, False)
    assert not out.any()
    assert lse.isneginf().all()


def test_converted_keys_lie_as_the_cache_s_do():
    """So that the kernel for decode on CPU takes them."""
    q, k, v = inputs(1, 40000)
    kept = cached(k, v)
    keys, values = (stored.converted(x[5:], torch.float32) for x in kept)
    assert takes(q, keys, values)
    assert torch.equal(keys, kept[0][5:].float())
    apart = kept[0].contiguous()  # as on a GPU
    assert stored.converted(apart, torch.bfloat16).stride() == apart.stride()


class Narrow(MathKernel):
    """As a kernel of a GPU that reads fp8."""

    name = "narrow"
    narrow = (torch.float8_e4m3fn,)


def test_a_kernel_that_names_the_type_gets_it_as_it_is():
    q, k, v = inputs(2, 40, dtype=torch.bfloat16)
    noting = Noting(Narrow())
    noting.narrow = Narrow.narrow
    for name, dtype in (("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.bfloat16)):
        kept = cached(k, v, name)
        out, _ = attend_stored(noting, q, *kept, 0.3, False)
        torch.testing.assert_close(out, reference(q, *(x.float() for x in kept), 0.3, False)[0].float())
        assert noting.calls.pop() == (40, dtype, False)
    assert stored.told(Narrow(), torch.float8_e4m3fn) == "fp8_e4m3 (read as stored)"
    assert stored.told(Narrow(), torch.float8_e5m2) == "fp8_e5m2 (converted for narrow)"


def test_an_unknown_name_lists_those_there_are(tiny):
    known = "'float32', 'bfloat16', 'float16', 'fp8_e4m3' or 'fp8_e5m2'"
    with pytest.raises(ValueError, match=f"cache.dtype='fp8' must be {known}"):
        LLM(tiny, cache={"dtype": "fp8"})


def test_a_torch_without_the_type_is_named_before_anything_is_loaded(tiny, monkeypatch):
    monkeypatch.delattr(torch, "float8_e5m2")
    monkeypatch.setattr(LLM, "load_weights", lambda self: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="cache.dtype=fp8_e5m2 needs a torch that has torch.float8_e5m2, and"):
        LLM(tiny, cache={"dtype": "fp8_e5m2"})


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2"])
def test_names_go_there_and_back(name):
    assert stored_name(stored_type(name)) == name


def test_the_engine_says_what_becomes_of_it_and_times_it(tiny):
    engine = LLM(tiny, attention={"kernel": "cpu"}, cache={"dtype": "fp8_e4m3"}).engine
    assert engine.describe() == "kernel cpu, float32, K/V in fp8_e4m3 (converted for cpu)"
    context = engine.encode([i * i % 251 for i in range(100)])
    shape = engine.stage.kv_shape
    layers = len(engine.stage.layer_numbers)
    assert context.cache.nbytes == 100 * layers * 2 * math.prod((shape.groups, shape.channels))
    assert all(seconds > 0 for seconds in time_cache_reads(engine, context).values())
    assert LLM(tiny, cache={"dtype": "bfloat16"}).engine.describe().endswith(", float32, K/V in bfloat16")
