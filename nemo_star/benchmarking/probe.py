"""How near decode attention comes to reading the cache once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from nemo_star.engine.context import EncodedContext
from nemo_star.engine.engine import Engine
from nemo_star.kernels.stored import attend_stored, is_fp8
from nemo_star.parallel.groups import barrier

ROUNDS = 9


def time_cache_reads(engine: Engine, context: EncodedContext) -> dict[str, float]:
    """Seconds that one token's attention takes over all of a context's K/V on this rank, without exchange, and seconds
    that reading the same bytes takes (a sum); all ranks at the same time, so that they share the memory as in decode,
    also those that hold nothing."""
    state, stage = engine.state, engine.stage
    shape = stage.kv_shape
    heads = stage.model.config.num_attention_heads // stage.model.tp_group.size()
    layers = [kv for number in stage.layer_numbers if (kv := context.cache.get(number)) is not None]
    q = torch.randn(1, shape.batch, heads, shape.channels, device=shape.device).to(shape.dtype)
    scale = shape.channels**-0.5

    def attend() -> None:
        for k, v in layers:
            attend_stored(state.decode_kernel, q, k, v, scale, causal=False)

    def read() -> None:
        for k, v in layers:
            _plain(k).sum(), _plain(v).sum()

    samples = [(_seconds(attend, engine), _seconds(read, engine)) for _ in range(ROUNDS + 1)]
    attention, reads = zip(*samples[1:], strict=True)  # the first warms up
    return {"decode_attention_seconds": statistics.median(attention), "kv_read_seconds": statistics.median(reads)}


def _plain(x: torch.Tensor) -> torch.Tensor:
    """The same bytes, of a type that has sums: fp8 has none."""
    if not is_fp8(x.dtype):
        return x
    return x.view(torch.int64 if x.shape[-1] % 8 == 0 else torch.uint8)


@torch.inference_mode()
def _seconds(work: Callable[[], None], engine: Engine) -> float:
    barrier(engine.groups.replica)
    engine.synchronize()
    started = time.perf_counter()
    work()
    engine.synchronize()
    return time.perf_counter() - started
