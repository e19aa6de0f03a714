"""Refuses a context that certainly does not fit, before the weights are loaded."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from nemo_star.planning.memory import kv_bytes, weight_elements
from nemo_star.planning.work import Workload
from nemo_star.runtime.memory import FreeMemory

GIB = 2**30


class MemoryLimit:
    """What the ranks' devices have free against what weights and K/V take. Activations and buffers come on top of
    these, so that nothing is refused that could run.

    Args:
        work: model, layout, attention and types; its context length is not used.
        free: of every rank, in rank order (tp fastest, then cp, dp, pp).
    """

    def __init__(self, work: Workload, free: Sequence[FreeMemory]) -> None:
        self._work = work
        self._free = free

    def check(self, context_tokens: int) -> None:
        """Refuse a context whose K/V do not fit beside the weights; 0 tokens: weights that do not fit.

        Raises:
            ValueError: names what is needed, what is free, and what would help.
        """
        problems = [self._shortage(context_tokens, replica) for replica in range(self._work.layout.dp)]
        if all(problems):  # a replica where it fits may be the one that is asked
            raise ValueError(problems[0])

    @property
    def kv_budget(self) -> int:
        """Bytes a rank for the K/V of several contexts: half of what the weights leave, the rest being for what a
        prefill and answers take beside them."""
        work, layout = self._work, self._work.layout
        weights: Counter[str] = Counter()
        for rank, memory in enumerate(self._free):
            stage = rank // (layout.tp * layout.cp * layout.dp)
            weights[memory.pool] += weight_elements(work.model, layout, stage) * work.dtype_bytes
        sharing = Counter(memory.pool for memory in self._free)
        left = [(memory.size - weights[memory.pool]) // (2 * sharing[memory.pool]) for memory in self._free]
        return max(1, min(left))

    @property
    def own_kv_budget(self) -> int:
        """Bytes a rank for the K/V of queries and answers: half of that other half."""
        return max(1, self.kv_budget // 2)

    def _shortage(self, context_tokens: int, replica: int) -> str | None:
        """What is missing where, if the replica were to answer; None where all fits."""
        work, layout = dataclasses.replace(self._work, context_tokens=context_tokens), self._work.layout
        tokens = work.tokens_by_rank if context_tokens else [0] * layout.cp
        weights: Counter[str] = Counter()
        kv: Counter[str] = Counter()
        free: dict[str, int] = {}
        for rank, memory in enumerate(self._free):
            stage, dp_rank = rank // (layout.tp * layout.cp * layout.dp), rank // (layout.tp * layout.cp) % layout.dp
            weights[memory.pool] += weight_elements(work.model, layout, stage) * work.dtype_bytes
            if dp_rank == replica:
                kv[memory.pool] += kv_bytes(work, stage, tokens[rank // layout.tp % layout.cp])
            free[memory.pool] = min(memory.size, free.get(memory.pool, memory.size))
        for pool, size in free.items():
            if weights[pool] + kv[pool] > size:
                count = sum(memory.pool == pool for memory in self._free)
                ranks = "1 rank there needs" if count == 1 else f"{count} ranks there need"
                return (
                    f"does not fit into {pool}: {ranks} at least "
                    f"{weights[pool] / GIB:.2f} GiB for weights and {kv[pool] / GIB:.2f} GiB for the K/V of a context "
                    f"of {context_tokens} tokens, {size / GIB:.2f} GiB are free; {self._ways(work)}"
                )
        return None

    def _ways(self, work: Workload) -> str:
        """What would help."""
        ways = ["more tensor-, pipeline- or context-parallel ranks on further devices", "a smaller dtype"]
        if work.context_tokens:
            narrower = {4: ["cache.dtype=bfloat16"], 2: ["cache.dtype=fp8_e4m3"]}
            ways += narrower.get(work.cache_bytes, [])
            if 0 in work.tokens_by_rank:
                ways.append("a smaller attention.block_size, so that every rank has a block")
            ways.append("a shorter context")
        return f"what helps: {', '.join(ways)}"
