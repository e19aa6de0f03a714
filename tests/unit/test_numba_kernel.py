"""Decode on CPU by Numba's code, against plain float64 attention."""

import ctypes
import importlib.util
import math
import mmap
import os
import platform
import subprocess
import sys

import pytest
import torch
from oracle import reference

from nemo_star.attention.cache import KVCache
from nemo_star.kernels import numba_kernel, registry
from nemo_star.kernels.numba_kernel import NumbaKernel
from nemo_star.kernels.torch_cpu import TorchCpuKernel


def cached(tokens, groups, channels, dtype=torch.float32, batch=1, factor=1.0):
    """K and V as the cache lays them, appended twice."""
    generator = torch.Generator().manual_seed(tokens)
    cache = KVCache(dtype, capacity=tokens + 3)
    for count in (tokens - tokens // 3, tokens // 3):
        kv = [torch.randn(count, batch, groups, channels, generator=generator) * factor for _ in range(2)]
        cache.append(1, *kv)
    return cache.get(1)


def query(heads, channels, batch=1, tokens=1):
    return torch.randn(tokens, batch, heads, channels, generator=torch.Generator().manual_seed(heads))


def check(q, k, v):
    out, lse = numba_kernel.attend(q, k, v, 0.3)
    expected_out, expected_lse = reference(q, k, v, 0.3, causal=False)
    torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    assert out.dtype == lse.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups", "channels"), [(8, 2, 64), (3, 3, 16), (14, 2, 80), (6, 1, 128)])
def test_it_computes_attention(dtype, heads, groups, channels):
    for tokens in (1, 15, 64, 257, 600):  # less than a vector, a tile, more
        check(query(heads, channels), *cached(tokens, groups, channels, dtype))


@pytest.mark.parametrize(("heads", "groups", "channels"), [(16, 1, 64), (5, 5, 256)])
def test_many_rows_and_long_rows(heads, groups, channels):
    check(query(heads, channels), *cached(700, groups, channels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_fill_vectors(dtype):
    for tokens in (1, 3, 63, 257):
        check(query(58, 48), *cached(tokens, 2, 48, dtype))


def test_several_tokens_are_rows_of_one_call():
    for tokens, heads, batch in ((2, 8, 1), (5, 8, 2), (16, 8, 1)):
        check(query(heads, 32, batch, tokens), *cached(700, 2, 32, batch=batch))


def test_batches_and_threads(monkeypatch):
    monkeypatch.setattr(numba_kernel, "BYTES_PER_THREAD", 2**17)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with torch.inference_mode():  # which other threads are not in
        check(query(4, 32, batch=2), *cached(1000, 2, 32, batch=2))
        check(query(4, 32, batch=2, tokens=3), *cached(1000, 2, 32, batch=2))


@pytest.mark.parametrize("factor", [100.0, 1000.0])
def test_scores_far_apart_neither_overflow_nor_vanish(factor):
    k, v = cached(900, 2, 64, factor=factor)
    out, lse = numba_kernel.attend(query(8, 64), k, v, 1.0)
    expected_out, expected_lse = reference(query(8, 64), k, v, 1.0, causal=False)
    torch.testing.assert_close(out.double(), expected_out, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=0.0, rtol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
@pytest.mark.parametrize("heads", [4, 16])
@pytest.mark.parametrize("tokens", [1, 100, 256, 333])
def test_nothing_is_read_behind_the_last_token(tokens, heads):
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
    check(query(heads, 64), *views)


def test_nothing_is_written_beside_the_results(monkeypatch):
    """Three rows: the buffers of threads and of groups lie side by side."""
    monkeypatch.setattr(numba_kernel, "BYTES_PER_THREAD", 2**15)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    check(query(9, 16), *cached(777, 3, 16))


@pytest.mark.parametrize("heads", [2, 16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_shows(value, heads):
    """As in torch's kernel: a broken checkpoint must not look sound."""
    k, v = cached(300, 1, 64)
    q = query(heads, 64)
    q[0, 0, 0, 5] = value
    out, _ = numba_kernel.attend(q, k, v, 0.3)
    assert out[0, 0, 0].isnan().all()
    assert out[0, 0, 1:].isfinite().all()
    k[150, 0, 0, 7] = math.nan
    assert numba_kernel.attend(query(heads, 64), k, v, 0.3)[0].isnan().all()


def test_float16_reads_every_number():
    """All 65,536 of them: subnormal, infinite, nan."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    expected = bits.float()
    q, k = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16, dtype=torch.float16)
    values = bits.view(-1, 1, 1, 1, 16)
    found = torch.cat([numba_kernel.attend(q, k, v, 1.0)[0].flatten() for v in values])
    torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its processors have an instruction for it since F16C only")
def test_float16_without_f16c(tmp_path):
    settings = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", f"{__file__}::test_float16_reads_every_number"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_kernel_takes_what_the_cache_holds(monkeypatch):
    calls = []
    monkeypatch.setattr(numba_kernel, "attend", lambda *given: calls.append(given))
    k, v = cached(8192, 2, 64)
    NumbaKernel().decode(query(8, 64), k, v, 0.3, causal=True)
    assert len(calls) == 1


def test_what_it_does_not_take_goes_to_torch(monkeypatch):
    k, v = cached(8192, 2, 64)
    assert numba_kernel.takes(query(8, 64), k, v)
    assert not numba_kernel.takes(query(8, 64, tokens=2), k, v)  # code for a query that comes once
    longer = cached(20000, 2, 64)
    assert numba_kernel.takes(query(8, 64, tokens=16), *longer)
    assert not numba_kernel.takes(query(8, 64, tokens=17), *longer)  # more rows: matrix products
    assert not numba_kernel.takes(query(8, 64), k[:4000], v[:4000])  # short
    assert not numba_kernel.takes(query(256, 64), k, v)  # 128 heads to a group
    assert not numba_kernel.takes(query(8, 64), *(x.clone(memory_format=torch.contiguous_format) for x in (k, v)))
    assert not numba_kernel.takes(query(8, 64), k.double(), v.double())
    assert not numba_kernel.takes(query(8, 24), *cached(30000, 2, 24))
    other = torch.zeros(2, 1, 8, 64)
    out = NumbaKernel().decode(other, k, v, 0.3, causal=True)
    torch.testing.assert_close(out, TorchCpuKernel().decode(other, k, v, 0.3, causal=True), atol=0, rtol=0)


@pytest.mark.parametrize("features", ["+avx2,+f16c", "+avx2,+avx512f,+f16c"])
def test_processors_with_few_and_with_many_registers(monkeypatch, features):
    """Each gets code of its own; both run anywhere."""
    from numba.core.caching import FunctionCache
    from numba.core.codegen import JITCPUCodegen

    from nemo_star.kernels import numba_code

    monkeypatch.setattr(FunctionCache, "save_overload", lambda *_: None)
    monkeypatch.setattr(FunctionCache, "load_overload", lambda *_: None)
    spec = importlib.util.spec_from_file_location("numba_code_of_another", numba_code.__file__)
    other = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(JITCPUCodegen, "magic_tuple", lambda _: ("", "", features))
        spec.loader.exec_module(other)
    assert (16 if "avx512f" in features else 8) == other.LANES
    monkeypatch.setattr(numba_kernel, "_code", other.compiled)
    for dtype, tokens in ((torch.float32, 257), (torch.bfloat16, 63), (torch.float16, 3)):
        check(query(14, 80), *cached(tokens, 2, 80, dtype))
    check(query(64, 80), *cached(257, 2, 80))


def test_a_full_disk_does_not_keep_it_from_working(monkeypatch):
    """numba keeps what is compiled beside the source, and raises where it cannot."""
    from numba.core.caching import FunctionCache

    from nemo_star.kernels import numba_code

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FunctionCache, "save_overload", full)
    monkeypatch.setattr(FunctionCache, "load_overload", lambda *_: None)
    assert numba_code.compiled(4, 32, "float32").signatures


def test_without_numba_nothing_is_missing():
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch\n"
        "from nemo_star.kernels import registry, numba_kernel\n"
        "numba_kernel.is_installed = registry.is_installed = lambda: False\n"
        "assert registry.get_kernel('auto', torch.device('cpu'), torch.float32).name == 'cpu'\n"
        "try: registry.get_kernel('numba', torch.device('cpu'), torch.float32)\n"
        "except ValueError as error: assert \"pip install 'nemo-star[cpu]'\" in str(error)\n"
        "else: raise SystemExit('not refused')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_numba_is_not_imported_before_it_is_needed():
    program = (
        "import sys, torch\n"
        "from nemo_star.kernels import registry\n"
        "kernel = registry.get_kernel('auto', torch.device('cpu'), torch.float32)\n"
        "assert kernel.name == 'numba'\n"
        "kernel.decode(torch.zeros(1, 1, 4, 16), torch.zeros(9, 1, 2, 16), torch.zeros(9, 1, 2, 16), 1.0, True)\n"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_it_can_be_switched_off():
    device = torch.device("cpu")
    assert registry.get_kernel("auto", device, torch.float32).name == "numba"
    assert type(registry.get_kernel("cpu", device, torch.float32)) is TorchCpuKernel
