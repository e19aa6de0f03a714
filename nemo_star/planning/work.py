"""What there is to do: a context cut into blocks, as the few ranks and blocks that differ.

A hundred million tokens may be a million blocks, but a method knows the few of them that differ, and the handful of
ranks that could be the slowest or the fullest. So nothing here grows with the context.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from nemo_star.config.model import ModelConfig
from nemo_star.methods.method import CountedBlock, Heads, Method, Share
from nemo_star.methods.partition import shares
from nemo_star.parallel.decode_slices import Sliced, sliced_matrices
from nemo_star.parallel.layout import Layout
from nemo_star.planning.flops import prefill_flops

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}


@dataclass(frozen=True)
class Workload:
    """One context through one model, by one attention method, on one layout."""

    model: ModelConfig
    layout: Layout
    method: Method
    context_tokens: int
    dtype: str = "bfloat16"
    cache_dtype: str | None = None
    decode: str | None = None
    """replicated or sharded; None: as the engine chooses."""
    device_type: str = "cuda"
    completes_prefill: bool = False
    """Whether the last layer's attention and FFN run, whose results nobody reads: in published programs."""

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def cache_bytes(self) -> int:
        return DTYPE_BYTES[self.cache_dtype or self.dtype]

    @property
    def sliced(self) -> frozenset[Sliced]:
        """What decode divides over cp."""
        return sliced_matrices(
            self.decode, self.model, self.layout, itemsize=self.dtype_bytes, device_type=self.device_type
        )

    @property
    def num_blocks(self) -> int:
        return self.method.num_blocks(self.context_tokens, self.layout.cp)

    @property
    def heads(self) -> Heads:
        """Of one tensor-parallel rank."""
        model, tp = self.model, self.layout.tp
        return Heads(model.query_width / tp, model.kv_width / tp, model.num_query_groups / tp)

    @property
    def tokens_by_rank(self) -> list[int]:
        """Context tokens whose K/V each cp rank caches."""
        return self.method.tokens_by_rank(self.context_tokens, self.layout.cp)

    @property
    def flops(self) -> int:
        """Operations of all ranks in a prefill."""
        complete = self.completes_prefill
        return prefill_flops(self.model, self.method, self.context_tokens, self.layout.cp, complete=complete)

    def resized(self, block_size: int) -> Workload:
        """The same with blocks (and an anchor) of another size."""
        return dataclasses.replace(self, method=self.method.resized(block_size))


def stage_windows(model: ModelConfig, stages: int, stage: int) -> Counter[int | None]:
    """How many layers of a pipeline stage have which window; None: those that see everything."""
    return Counter(map(model.window_of, range(*shares(model.num_layers, stages)[stage])))


@dataclass(frozen=True)
class RankWork:
    """What one cp rank encodes: blocks that differ, and how many there are of each."""

    cp_rank: int
    blocks: tuple[CountedBlock, ...]
    share: Share

    @property
    def tokens(self) -> int:
        """Context tokens whose K/V the rank caches."""
        return sum(count * block.tokens for block, count in self.blocks)


def rank_work(work: Workload) -> list[RankWork]:
    """The cp ranks that could be the slowest or the fullest; every other one is like one of them."""
    return [work_of(work, rank) for rank in work.method.ranks_to_plan(work.context_tokens, work.layout.cp)]


def work_of(work: Workload, cp_rank: int) -> RankWork:
    """What one rank encodes."""
    tokens, cp = work.context_tokens, work.layout.cp
    blocks = tuple(work.method.rank_blocks(tokens, cp, cp_rank))
    return RankWork(cp_rank, blocks, Share(tokens, cp, sum(count for _, count in blocks), work.num_blocks))


def max_in_flight(work: Workload, rank: RankWork) -> int:
    """Tokens of the longest forward pass of a rank."""
    return max((work.method.tokens_in_flight(block) for block, _ in rank.blocks), default=0)
