"""`tools/benchmark_kernels.py`: attention kernels against torch's own, on one device, without a model.

Prefill: causal attention of a block over [anchor | block], in floating-point operations per second. torch's backends
get the same work as two calls, unmasked over the anchor and causal over the block, and are spared the merge.

Decode: one token over cached keys, in bytes of K and V per second, beside what a copy reaches in the same run.

All contenders of a shape run in turn, there and back, `repeats` times; a row has the median. CUDA is timed by events
around several calls, issued while the device is busy with something else, so that it does not wait for Python.

Some libraries make a plan for each length (cuDNN), and in decode each length comes once: contenders are warmed up at
another length, and a row has the first call at its own, too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nemo_star.attention.cache import KVCache
from nemo_star.kernels.registry import get_kernel, kernels_that_run

TORCH_BACKENDS = {
    "torch:cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch:flash": SDPBackend.FLASH_ATTENTION,
    "torch:efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MAX_SCORES = 2**28
"""The math kernel writes every score; shapes above take long and are left out for it."""
SAMPLE_SECONDS, MAX_CALLS = 2e-3, 32
"""So many calls make a sample that it takes about so long."""
BUSY_BYTES, BUSY_TIMES = 2**28, 32
"""Written before a sample of several calls: 8.6 GB, 2.5 ms at an H100's data sheet's 3.35 TB/s."""

Contenders = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Shape:
    """One measurement: `anchor` tokens before the block in prefill, `cached` tokens in decode."""

    phase: str
    queries: int
    keys: int
    heads: int
    groups: int
    channels: int

    @property
    def flops(self) -> int:
        """Two products of 2 * hn operations for each query head and visible pair of query and key."""
        before = self.keys - self.queries
        visible = self.queries * before + self.queries * (self.queries + 1) // 2
        return 4 * self.channels * self.heads * visible

    def kv_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.keys * self.groups * self.channels * dtype.itemsize


def measure(shape: Shape, *, device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Rows of one shape: `{**shape, kernel, seconds, first_seconds, tflops | bytes_per_second, repeats, dtype}`.

    `first_seconds`: of the first call at this shape, by the host's clock, until the device has done it.

    A contender that cannot run has `seconds` None and `withheld`, the reason.
    """
    q, k, v = _inputs(shape, device, dtype)
    contenders = _contenders(shape, q, k, v)
    shorter = _contenders(shape, q if shape.queries == 1 else q[1:], k[1:], v[1:]) if shape.keys > 1 else contenders
    if shape.phase == "decode":
        source = torch.stack((k, v))
        target = torch.empty_like(source)
        contenders = {"copy": lambda: target.copy_(source), **contenders}
    first, withheld = _first_calls(contenders, shorter, device)
    seconds = _in_turn({name: contenders[name] for name in first}, device, repeats)
    common = {**asdict(shape), "dtype": str(dtype).removeprefix("torch."), "repeats": repeats}
    rows = []
    for name in contenders:
        times = {"seconds": seconds.get(name), "first_seconds": first.get(name)}
        row = {**common, "kernel": name, **times, "withheld": withheld.get(name)}
        if name in seconds and shape.phase == "prefill":
            row["tflops"] = shape.flops / seconds[name] / 1e12
        elif name in seconds:
            moved = shape.kv_bytes(dtype) * (2 if name == "copy" else 1)  # a copy reads and writes
            row["bytes_per_second"] = moved / seconds[name]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], *, titles: bool = True) -> str:
    """Rows for a person."""
    lines = (
        [f"{'phase':<8} {'queries':>8} {'keys':>8} {'kernel':<16} {'ms':>10} {'first ms':>10}  rate"] if titles else []
    )
    for row in rows:
        head = f"{row['phase']:<8} {row['queries']:>8} {row['keys']:>8} {row['kernel']:<16}"
        if row["seconds"] is None:
            lines.append(f"{head} {'-':>10} {'-':>10}  withheld: {row['withheld']}")
        else:
            rate = f"{row['tflops']:.3g} TFLOP/s" if "tflops" in row else f"{row['bytes_per_second'] / 1e9:.3g} GB/s"
            times = f"{row['seconds'] * 1e3:>10.3f} {row['first_seconds'] * 1e3:>10.3f}"
            lines.append(f"{head} {times}  {rate}")
    return "\n".join(lines)


def _inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q [sq, 1, np, hn]; k, v [sk, 1, ng, hn], in decode as the cache lays them."""
    generator = torch.Generator(device).manual_seed(0)

    def make(length: int, heads: int) -> Tensor:
        return torch.randn(length, 1, heads, shape.channels, generator=generator, device=device, dtype=dtype)

    k, v = make(shape.keys, shape.groups), make(shape.keys, shape.groups)
    if shape.phase == "decode":
        cache = KVCache()
        cache.append(1, k, v)
        k, v = cast("tuple[Tensor, Tensor]", cache.get(1))
    return make(shape.queries, shape.heads), k, v


def _contenders(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Contenders:
    scale = shape.channels**-0.5
    found: Contenders = {}
    for name in kernels_that_run(q.device, q.dtype):
        kernel = get_kernel(name, q.device, q.dtype)
        if name == "math" and shape.queries * shape.keys * shape.heads > MAX_SCORES:
            continue
        if shape.phase == "prefill":
            found[name] = lambda kernel=kernel: kernel.prefill(q, k, v, scale)  # type: ignore[misc]
        else:
            found[name] = lambda kernel=kernel: kernel.decode(q, k, v, scale, causal=True)  # type: ignore[misc]
    for name, backend in TORCH_BACKENDS.items():
        found[name] = lambda backend=backend: _by_torch(backend, q, k, v, scale)  # type: ignore[misc]
    return found


def _by_torch(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[Tensor]:
    """The parts of [before | own], each by torch's backend; for a single query the keys are one part, unmasked."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    sq, before = q.shape[2], k.shape[2] - q.shape[2]
    grouped: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    with sdpa_kernel(backend):
        if sq == 1:
            return [scaled_dot_product_attention(q, k, v, **grouped)]
        own = scaled_dot_product_attention(q, k[:, :, before:], v[:, :, before:], is_causal=True, **grouped)
        if not before:
            return [own]
        return [own, scaled_dot_product_attention(q, k[:, :, :before], v[:, :, :before], **grouped)]


@torch.inference_mode()
def _first_calls(
    contenders: Contenders, shorter: Contenders, device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """(seconds of the first call by contender, reasons of those that do not run).

    Args:
        shorter: the same with a key less, which are run before: workspaces are made and code is loaded then.
    """
    first: dict[str, float] = {}
    withheld: dict[str, str] = {}
    for name, work in contenders.items():
        try:
            shorter.get(name, work)()
            _synchronize(device)
            started = time.perf_counter()
            work()
            _synchronize(device)
            first[name] = time.perf_counter() - started
        except Exception as error:  # libraries refuse a shape with whatever they like
            withheld[name] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    return first, withheld


@torch.inference_mode()
def _in_turn(contenders: Contenders, device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds by contender."""
    calls = {}
    for name, work in contenders.items():
        once = _seconds(work, device, calls=1)
        calls[name] = min(MAX_CALLS, max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            times[name].append(_seconds(contenders[name], device, calls=calls[name]))
    return {name: statistics.median(samples) for name, samples in times.items()}


def _seconds(work: Callable[[], Any], device: torch.device, *, calls: int) -> float:
    """Of one call, from so many one after the other."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - started) / calls
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _synchronize(device)
    if calls > 1:
        _keep_busy(device)
    before.record()
    for _ in range(calls):
        work()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / calls


def _keep_busy(device: torch.device) -> None:
    """Give the device a millisecond or more to do, so that calls wait in its queue and it never waits for Python."""
    filled = torch.empty(BUSY_BYTES, dtype=torch.uint8, device=device)
    for _ in range(BUSY_TIMES):
        filled.zero_()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
