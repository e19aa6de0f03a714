"""Whether a context fits by the plan, before it is measured: a run that dies of memory takes its process with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nemo_star.benchmarking.contenders import Contender
from nemo_star.config.benchmark import TRANSFORMERS
from nemo_star.config.model import ModelConfig
from nemo_star.kernels.stored import stored_name
from nemo_star.planning.limit import GIB
from nemo_star.planning.memory import activation_bytes, kv_bytes, weight_elements
from nemo_star.planning.work import Workload, work_of
from nemo_star.runtime.memory import FreeMemory


def shortage(contender: Contender, model: ModelConfig, tokens: int, free: Sequence[FreeMemory]) -> str | None:
    """Why a context of so many tokens does not fit, on the rank or machine that lacks most; None where it fits.

    Unlike `planning.limit.MemoryLimit` it counts activations, too, which are an estimate.

    Args:
        free: of every rank, in rank order, when the weights are there.
    """
    layout = contender.layout
    dtype, cache_dtype = (stored_name(each or contender.dtype) for each in (contender.dtype, contender.cache_dtype))
    work = Workload(model, layout, contender.method, tokens, dtype=dtype, cache_dtype=cache_dtype)
    kv: Counter[str] = Counter()
    beside: Counter[str] = Counter()
    room: dict[str, int] = {}
    for rank, memory in enumerate(free[: layout.tp * layout.cp * layout.pp]):  # alone: the first rank
        share = work_of(work, rank // layout.tp % layout.cp)
        kv[memory.pool] += kv_bytes(work, rank // (layout.tp * layout.cp), share.tokens)
        beside[memory.pool] += activation_bytes(work, share)
        if contender.candidate.kind == TRANSFORMERS:  # which takes a copy of the weights
            beside[memory.pool] += weight_elements(model, layout, 0) * work.dtype_bytes
        room[memory.pool] = min(memory.size, room.get(memory.pool, memory.size))
    fullest = max(room, key=lambda pool: kv[pool] + beside[pool] - room[pool])
    if kv[fullest] + beside[fullest] <= room[fullest]:
        return None
    return (
        f"does not fit into {fullest}: {kv[fullest] / GIB:.2f} GiB of K/V and about {beside[fullest] / GIB:.2f} GiB "
        f"beside them, {room[fullest] / GIB:.2f} GiB are free"
    )
