"""What there is to do: a context cut into blocks, as the few ranks and kinds of blocks that differ.

A hundred million tokens may be a million blocks, but only three kinds of them (the first, a full one, the last), and a
handful of ranks that could be the slowest or the fullest. So nothing here grows with the context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_star.config.model import ModelConfig
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.partition import PARTITIONS, Block
from nemo_star.parallel.decode_slices import Part, sliced_parts
from nemo_star.parallel.layout import Layout
from nemo_star.planning.flops import attention_pairs, block_flops, tokens_in_flight

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Workload:
    """One context through one model, by one kind of attention, on one layout."""

    model: ModelConfig
    layout: Layout
    attention: AttentionConfig
    context_tokens: int
    dtype: str = "bfloat16"
    cache_dtype: str | None = None
    decode: str | None = None
    """replicated or sharded; None: as the engine chooses."""
    device_type: str = "cuda"
    zigzag: bool = True
    """Ring attention deals its pieces in zigzag; published rings give each rank one contiguous piece."""

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def cache_bytes(self) -> int:
        return DTYPE_BYTES[self.cache_dtype or self.dtype]

    @property
    def sliced(self) -> frozenset[Part]:
        """What decode divides over cp."""
        return sliced_parts(
            self.decode, self.model, self.layout, itemsize=self.dtype_bytes, device_type=self.device_type
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """(block size, anchor size) in tokens."""
        return self.attention.sizes(self.context_tokens)

    @property
    def num_blocks(self) -> int:
        """Blocks of the context; exact kinds have one a rank."""
        if self.attention.kind != "star":
            return self.layout.cp
        return -(-self.context_tokens // self.sizes[0])


@dataclass(frozen=True)
class RankWork:
    """What one cp rank encodes: kinds of blocks, and how many there are of each."""

    cp_rank: int
    blocks: tuple[tuple[Block, int], ...]

    @property
    def tokens(self) -> int:
        """Context tokens whose K/V the rank caches."""
        return sum(count * block.tokens for block, count in self.blocks)

    @property
    def num_blocks(self) -> int:
        return sum(count for _, count in self.blocks)


def rank_work(work: Workload) -> list[RankWork]:
    """The cp ranks that could be the slowest or the fullest; every other one is like one of them."""
    n, cp = work.context_tokens, work.layout.cp
    if work.attention.kind == "star":
        share, extra = divmod(work.num_blocks, cp)
        ends = {0, 1, extra - 1, extra, cp - 1, min(work.num_blocks, cp) - 1}
        return [star_rank(work, rank) for rank in sorted(ends) if 0 <= rank < cp]
    kind = work.attention.kind if work.zigzag else "dense"
    ranks = PARTITIONS[kind](n, *work.sizes, cp).ranks
    slowest = max(range(cp), key=lambda rank: attention_pairs(ranks[rank][0], work.attention))
    return [RankWork(rank, ((ranks[rank][0], 1),)) for rank in sorted({0, slowest})]


def star_rank(work: Workload, cp_rank: int) -> RankWork:
    """The blocks of one rank, as `partition.star_partition` deals them, without making them one by one."""
    share, extra = divmod(work.num_blocks, work.layout.cp)
    first = cp_rank * share + min(cp_rank, extra)
    return RankWork(cp_rank, tuple(_star_blocks(work, first, first + share + (cp_rank < extra))))


def total_flops(work: Workload) -> int:
    """Operations of all ranks in a prefill, as `flops.prefill_flops` counts them block by block."""
    n = work.context_tokens
    if work.attention.kind == "star":
        blocks: Sequence[tuple[Block, int]] = _star_blocks(work, 0, work.num_blocks)
    else:
        blocks = [(Block(0, ((0, n),)), 1)]
    per_layer = sum(count * block_flops(work.model, block, work.attention) for block, count in blocks)
    return work.model.num_layers * per_layer


def tokens_by_rank(work: Workload) -> list[int]:
    """Context tokens whose K/V each cp rank caches."""
    cp = work.layout.cp
    if work.attention.kind == "star":
        return [star_rank(work, rank).tokens for rank in range(cp)]
    partition = PARTITIONS[work.attention.kind](work.context_tokens, *work.sizes, cp)
    return [partition.tokens_of(rank) for rank in range(cp)]


def rank_attention_pairs(work: Workload, block: Block) -> float:
    """(query, key) pairs of one layer that a rank computes with all its heads' worth of work.

    Ulysses gives each rank the whole context for a share of the heads, so every rank has the same.
    """
    if work.attention.kind == "ulysses":
        return attention_pairs(Block(0, ((0, work.context_tokens),)), work.attention) / work.layout.cp
    return attention_pairs(block, work.attention)


def most_in_flight(work: Workload, rank: RankWork) -> int:
    """Tokens of the longest forward pass of a rank."""
    return max((tokens_in_flight(block, work.attention) for block, _ in rank.blocks), default=0)


def with_attention(work: Workload, **changes: object) -> Workload:
    """The same workload with other fields of its attention."""
    return dataclasses.replace(work, attention=dataclasses.replace(work.attention, **changes))  # type: ignore[arg-type]


def _star_blocks(work: Workload, start: int, stop: int) -> list[tuple[Block, int]]:
    """Blocks `start` to `stop` of the context: the first, one full one for all those between, the last."""
    n, (block_size, anchor_size) = work.context_tokens, work.sizes
    last = work.num_blocks - 1
    kinds = []
    if start == 0 < stop:
        kinds.append((Block(0, ((0, min(block_size, n)),)), 1))
        start = 1
    between = min(stop, last) - start
    if between > 0:
        full = (start * block_size, (start + 1) * block_size)
        kinds.append((Block(start, (full,), anchor_size), between))
    if start <= last < stop:
        kinds.append((Block(last, ((last * block_size, n),), anchor_size), 1))
    return kinds
