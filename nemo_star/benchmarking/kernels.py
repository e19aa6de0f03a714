"""`tools/benchmark_kernels.py`: attention kernels against torch's own, on one device, without a model.

Prefill: causal attention of a block over [anchor | block], in floating-point operations per second. torch's backends
get the same work as two calls, unmasked over the anchor and causal over the block, and are spared the merge.

Decode: one token over cached keys, in bytes of K and V per second, beside what a copy reaches in the same run; where
Triton's kernel runs, over the same keys in float8, too.

Merge: partial results as they arrive from all ranks, in bytes read and written per second. On a GPU the host matters
more, which has to launch what torch does in many kernels: a row has its time, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nemo_star.attention.cache import KVCache
from nemo_star.benchmarking.timing import Contenders, first_calls, in_turn
from nemo_star.kernels.merge import Merge
from nemo_star.kernels.registry import Kernel, get_kernel, get_merge, kernels_that_run

TORCH_BACKENDS = {
    "torch:cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch:flash": SDPBackend.FLASH_ATTENTION,
    "torch:efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLOAT8 = {"triton:e4m3": torch.float8_e4m3fn, "triton:e5m2": torch.float8_e5m2}
MAX_SCORES = 2**28
"""The math kernel writes every score; shapes above take long and are left out for it."""


@dataclass(frozen=True)
class Shape:
    """One measurement: prefill of a block after an anchor, decode over cached tokens, or a merge."""

    phase: str
    queries: int
    keys: int
    """Of a merge: the partial results."""
    heads: int
    groups: int
    channels: int

    @property
    def flops(self) -> int:
        """Two products of 2 * hn operations for each query head and visible pair of query and key."""
        before = self.keys - self.queries
        visible = self.queries * before + self.queries * (self.queries + 1) // 2
        return 4 * self.channels * self.heads * visible

    def bytes_moved(self, kernel: str, dtype: torch.dtype) -> int:
        """K and V that are read, or partial results in float32 and their merge in `dtype`."""
        if self.phase == "merge":
            rows = self.queries * self.heads
            return rows * (4 * self.keys * (self.channels + 1) + dtype.itemsize * self.channels + 4)
        read = 2 * self.keys * self.groups * self.channels * FLOAT8.get(kernel, dtype).itemsize
        return 2 * read if kernel == "copy" else read  # a copy reads and writes


def measure(shape: Shape, *, device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Rows of one shape: `{**shape, kernel, seconds, first_seconds, host_seconds, tflops | bytes_per_second, repeats,
    dtype}`.

    `first_seconds`: of the first call at this shape, by the host's clock, until the device has done it.
    `host_seconds`: until a call returns, of a GPU that is busy with something else.

    A contender that cannot run has `seconds` None and `withheld`, the reason.
    """
    contenders, shorter = _merges(shape, device, dtype) if shape.phase == "merge" else _kernels(shape, device, dtype)
    first, withheld = first_calls(contenders, shorter, device)
    seconds, host_seconds = in_turn({name: contenders[name] for name in first}, device, repeats)
    common = {**asdict(shape), "dtype": str(dtype).removeprefix("torch."), "repeats": repeats}
    rows = []
    for name in contenders:
        times = {"seconds": seconds.get(name), "first_seconds": first.get(name), "host_seconds": host_seconds.get(name)}
        row = {**common, "kernel": name, **times, "withheld": withheld.get(name)}
        if name in seconds and shape.phase == "prefill":
            row["tflops"] = shape.flops / seconds[name] / 1e12
        elif name in seconds:
            row["bytes_per_second"] = shape.bytes_moved(name, dtype) / seconds[name]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], *, titles: bool = True) -> str:
    """Rows for a person."""
    title = f"{'phase':<8} {'queries':>8} {'keys':>8} {'kernel':<16} {'ms':>10} {'host ms':>10} {'first ms':>10}  rate"
    lines = [title] if titles else []
    for row in rows:
        head = f"{row['phase']:<8} {row['queries']:>8} {row['keys']:>8} {row['kernel']:<16}"
        if row["seconds"] is None:
            lines.append(f"{head} {'-':>10} {'-':>10} {'-':>10}  withheld: {row['withheld']}")
        else:
            rate = f"{row['tflops']:.3g} TFLOP/s" if "tflops" in row else f"{row['bytes_per_second'] / 1e9:.3g} GB/s"
            times = " ".join(f"{row[name] * 1e3:>10.3f}" for name in ("seconds", "host_seconds", "first_seconds"))
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


def _merges(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Contenders, Contenders]:
    """(what merges, the same on other rows) of partial results, out and lse in one buffer as ranks gather them."""

    def merging(merge: Merge, queries: int) -> Callable[[], Any]:
        size = (shape.keys, queries, 1, shape.heads, shape.channels + 1)
        gathered = torch.randn(size, generator=torch.Generator(device).manual_seed(0), device=device)
        return lambda: merge(gathered[..., :-1], gathered[..., -1], None, dtype)

    names = ("torch",) if get_merge("auto", device) is get_merge("torch", device) else ("torch", "triton")
    own, others = (
        {name: merging(get_merge(name, device), queries) for name in names}
        for queries in (shape.queries, shape.queries + 1)
    )
    return own, others


def _kernels(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Contenders, Contenders]:
    """(what attends, the same with a key less)."""
    q, k, v = _inputs(shape, device, dtype)
    own = _contenders(shape, q, k, v)
    shorter = _contenders(shape, q if shape.queries == 1 else q[1:], k[1:], v[1:]) if shape.keys > 1 else own
    if shape.phase == "prefill":
        return own, shorter
    source = torch.stack((k, v))
    target = torch.empty_like(source)
    return {"copy": lambda: target.copy_(source), **own}, shorter


def _contenders(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Contenders:
    scale = shape.channels**-0.5
    found: Contenders = {}

    def decoding(kernel: Kernel, k: Tensor, v: Tensor) -> Callable[[], Any]:
        return lambda: kernel.decode(q, k, v, scale, causal=True)

    for name in kernels_that_run(q.device, q.dtype):
        kernel = get_kernel(name, q.device, q.dtype)
        if name == "math" and shape.queries * shape.keys * shape.heads > MAX_SCORES:
            continue
        if shape.phase == "decode":
            found[name] = decoding(kernel, k, v)
        elif name != "triton":  # whose prefill is flash's
            found[name] = lambda kernel=kernel: kernel.prefill(q, k, v, scale)  # type: ignore[misc]
    if "triton" in found:
        for name, dtype in FLOAT8.items():
            found[name] = decoding(get_kernel("triton", q.device, q.dtype), k.to(dtype), v.to(dtype))
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
