"""DeepSpeed-Ulysses: exact, heads instead of sequence by all-to-all (arXiv 2309.14509)."""

from __future__ import annotations

from nemo_star.methods.method import Exchange, Heads, Method, Share
from nemo_star.methods.partition import Block, Partition, band, contiguous, triangle


class Ulysses(Method):
    """Each rank has a contiguous span of the context with all heads, and for attention all of it with some heads."""

    kind = "ulysses"
    attention = "nemo_star.attention.ulysses:UlyssesAttention"
    takes_windows = True

    def partition(self, context_tokens: int, cp_size: int) -> Partition:
        return contiguous(context_tokens, cp_size)

    def check_heads(self, heads: int, groups: int, cp_size: int) -> None:
        if heads % cp_size:
            raise ValueError(
                f"attention=ulysses: {heads} query heads per tensor-parallel rank are not divisible by "
                f"context_parallel_size {cp_size}"
            )
        if groups % cp_size and cp_size % groups:
            raise ValueError(
                f"attention=ulysses: {groups} KV heads per tensor-parallel rank and context_parallel_size {cp_size}: "
                "one must be a multiple of the other"
            )

    def rank_pairs(self, block: Block, share: Share) -> float:
        """Each rank has the whole context for a share of the heads, so every rank has the same."""
        return triangle(share.context_tokens) / share.cp_size

    def rank_windowed_pairs(self, block: Block, share: Share, window: int) -> float:
        return band(share.context_tokens, window) / share.cp_size

    def exchanges(self, block: Block, share: Share, heads: Heads) -> list[Exchange]:
        """Queries there and the output back, keys and values; nothing hides them."""
        sent = block.tokens * (share.cp_size - 1) / share.cp_size
        copies = max(1.0, share.cp_size / heads.groups)  # fewer KV heads than ranks go to all that need them
        return [
            Exchange(heads.query * sent, share.cp_size, times=2),
            Exchange(heads.kv * copies * sent, share.cp_size, times=2),
        ]

    def windowed_exchanges(self, block: Block, share: Share, heads: Heads, window: int) -> list[Exchange]:
        """All heads travel, whatever they see."""
        return self.exchanges(block, share, heads)

    def attention_bytes(self, tokens: int, share: Share, heads: Heads, itemsize: int) -> float:
        """What is sent and what has come, of queries (and of the output), keys and values."""
        return 2 * tokens * (heads.query + 2 * heads.kv) * itemsize
