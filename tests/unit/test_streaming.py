"""Code made for decode on CPU, against plain float64 attention; for every width of vector registers, which LLVM splits
or joins to those of the machine at hand."""

import ctypes
import math
import mmap
import subprocess
import sys

import pytest
import torch
from oracle import reference

from nemo_star.attention.cache import KVCache
from nemo_star.kernels import streaming
from nemo_star.kernels.registry import CpuKernel


def cached(tokens, groups, channels, dtype=torch.float32, batch=1, factor=1.0):
    """K and V as the cache lays them, of a request in two parts."""
    generator = torch.Generator().manual_seed(tokens)
    cache = KVCache(dtype, capacity=tokens + 3)
    for part in (tokens - tokens // 3, tokens // 3):
        kv = [torch.randn(part, batch, groups, channels, generator=generator) * factor for _ in range(2)]
        cache.append(1, *kv)
    return cache.get(1)


def query(heads, channels, batch=1):
    return torch.randn(1, batch, heads, channels, generator=torch.Generator().manual_seed(heads))


def check(q, k, v):
    out, lse = streaming.attend(q, k, v, 0.3)
    expected_out, expected_lse = reference(q, k, v, 0.3, causal=False)
    torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    assert out.dtype == lse.dtype == torch.float32


@pytest.fixture(params=[(16, 32), (8, 16), (4, 32)], ids=["16 lanes", "8 lanes", "4 lanes"])
def lanes(request, monkeypatch):
    monkeypatch.setattr(streaming, "vector_unit", lambda: request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups", "channels"), [(8, 2, 64), (3, 3, 16), (14, 2, 80), (6, 1, 128)])
def test_every_width_computes_attention(lanes, dtype, heads, groups, channels):
    for tokens in (1, 15, 257, 600):  # less than a vector, more than a tile
        check(query(heads, channels), *cached(tokens, groups, channels, dtype))


@pytest.mark.parametrize(("heads", "groups", "channels"), [(16, 1, 64), (5, 5, 256)])
def test_many_rows_and_long_rows(heads, groups, channels):
    check(query(heads, channels), *cached(700, groups, channels))


def test_batches_and_threads(monkeypatch):
    monkeypatch.setattr(streaming, "BYTES_PER_THREAD", 2**17)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with torch.inference_mode():  # which other threads are not in
        check(query(4, 32, batch=2), *cached(1000, 2, 32, batch=2))


@pytest.mark.parametrize("factor", [100.0, 1000.0])
def test_scores_far_apart_neither_overflow_nor_vanish(factor):
    k, v = cached(900, 2, 64, factor=factor)
    out, lse = streaming.attend(query(8, 64), k, v, 1.0)
    expected_out, expected_lse = reference(query(8, 64), k, v, 1.0, causal=False)
    torch.testing.assert_close(out.double(), expected_out, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=0.0, rtol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
@pytest.mark.parametrize("tokens", [1, 100, 256, 333])
def test_nothing_is_read_behind_the_last_token(tokens):
    """K and V end at a page that must not be touched."""
    views = []
    for part in cached(tokens, 1, 64):
        size = -(-part.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, size + mmap.PAGESIZE)
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        end = buffer.data_ptr() + size
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
        view = buffer[size - part.nbytes : size].view(torch.float32).view(1, 1, tokens, 64).permute(2, 0, 1, 3)
        views.append(view.copy_(part))
    check(query(4, 64), *views)


def test_nothing_is_written_beside_the_results(monkeypatch):
    """Three rows: the buffers of threads and of groups lie side by side."""
    monkeypatch.setattr(streaming, "BYTES_PER_THREAD", 2**15)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    check(query(9, 16), *cached(777, 3, 16))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_shows(value):
    """As in torch's kernel: a broken checkpoint must not look sound."""
    k, v = cached(300, 1, 64)
    q = query(2, 64)
    q[0, 0, 0, 5] = value
    out, _ = streaming.attend(q, k, v, 0.3)
    assert out[0, 0, 0].isnan().all()
    assert out[0, 0, 1].isfinite().all()
    k[150, 0, 0, 7] = math.nan
    assert streaming.attend(query(2, 64), k, v, 0.3)[0].isnan().all()


def test_a_release_that_cannot_make_the_code_is_told_once_and_torch_does_the_work(monkeypatch):
    def fails(*_):
        raise RuntimeError("unknown instruction")

    monkeypatch.setattr("llvmlite.binding.parse_assembly", fails)
    monkeypatch.setattr(streaming, "MOST_ROWS", 17)
    k, v = cached(8192, 1, 64)
    with pytest.warns(UserWarning, match="cannot make code for decode attention: unknown instruction"):
        assert not streaming.streams(query(17, 64), k, v)
    out, _ = CpuKernel().decode(query(17, 64), k, v, 0.3, causal=True)
    torch.testing.assert_close(out.double(), reference(query(17, 64), k, v, 0.3, causal=False)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("found", "used"), [("0.44.0", None), ("0.45.1", "0.45.1"), ("1.0", "1.0")])
def test_an_old_llvmlite_is_none(monkeypatch, found, used):
    monkeypatch.setattr(streaming, "version", lambda name: found)
    assert streaming.llvm_version.__wrapped__() == used


def test_the_cpu_kernel_streams_what_the_cache_holds(monkeypatch):
    calls = []
    monkeypatch.setattr(streaming, "attend", lambda *given: calls.append(given))
    k, v = cached(8192, 2, 64)
    CpuKernel().decode(query(8, 64), k, v, 0.3, causal=True)
    assert len(calls) == 1


def test_what_it_does_not_take_goes_to_torch(monkeypatch):
    k, v = cached(8192, 2, 64)
    assert streaming.streams(query(8, 64), k, v)
    assert not streaming.streams(torch.zeros(2, 1, 8, 64), k, v)  # several tokens: matrix products
    assert not streaming.streams(query(8, 64), k[:4000], v[:4000])  # short
    assert not streaming.streams(query(64, 64), k, v)  # 32 heads to a group
    assert not streaming.streams(query(8, 64), *(x.clone(memory_format=torch.contiguous_format) for x in (k, v)))
    assert not streaming.streams(query(8, 64), k.double(), v.double())
    assert not streaming.streams(query(8, 24), *cached(30000, 2, 24))
    monkeypatch.setattr(streaming, "llvm_version", lambda: None)
    assert not streaming.streams(query(8, 64), k, v)
    out, lse = CpuKernel().decode(query(8, 64), k, v, 0.3, causal=False)
    torch.testing.assert_close((out, lse), streaming.attend(query(8, 64), k, v, 0.3), atol=1e-5, rtol=1e-5)


def test_without_llvmlite_nothing_is_missing():
    program = (
        "import sys; sys.modules['llvmlite'] = None\n"
        "from nemo_star.kernels import registry, streaming\n"
        "assert streaming.llvm_version() is None"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
