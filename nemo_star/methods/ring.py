"""Ring attention: exact, K/V travel round the cp ranks (arXiv 2310.01889), load-balanced by zigzag spans."""

from __future__ import annotations

from nemo_star.methods.method import Exchange, Heads, Method, Share
from nemo_star.methods.partition import Block, Partition, shares


class Ring(Method):
    """Of 2 * cp contiguous spans rank r has spans r and 2 * cp - 1 - r, so that causal work is balanced.

    Spans differ by at most one token and may be empty: nothing is padded.
    """

    kind = "ring"
    attention = "nemo_star.attention.ring:RingAttention"
    takes_windows = True

    def partition(self, context_tokens: int, cp_size: int) -> Partition:
        spans = shares(context_tokens, 2 * cp_size)
        ranks = tuple((Block(rank, (spans[rank], spans[-1 - rank])),) for rank in range(cp_size))
        return Partition(context_tokens, ranks)

    def exchanges(self, block: Block, share: Share, heads: Heads) -> list[Exchange]:
        """A hop of K/V in each of cp - 1 steps, while the part of attention of a step is computed."""
        hop = 2 * heads.kv * block.tokens
        return [Exchange(hop, 2, times=share.cp_size - 1, beside_attention=1 / share.cp_size)]

    def attention_bytes(self, tokens: int, share: Share, heads: Heads, itemsize: int) -> float:
        """Own and arriving K/V; in float32 the results: so far, of a step, the two stacked."""
        if share.cp_size == 1:
            return 0.0
        return tokens * (4 * heads.kv * itemsize + 4 * heads.query * 4)
