"""Ring attention: exact, K/V travel round the cp ranks (arXiv 2310.01889), load-balanced by zigzag spans.

Rank r holds spans r and 2 * cp - 1 - r of the context. In turn i it has the K/V of rank r - i, attends to those
of them that its tokens may see, and passes them on; sending and receiving run while it computes. Partial results are
merged by log-sum-exp. What stays cached is the rank's own K/V, so decode is every method's.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_star.attention.core import CoreAttention
from nemo_star.attention.step import PrefillStep
from nemo_star.kernels.merge import merge_partials, with_sinks
from nemo_star.methods.partition import Block


class RingAttention(CoreAttention):
    """Exact causal attention over the whole context, sharded in zigzag."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, step: PrefillStep) -> Tensor:
        if self.window is not None:
            return self.prefill_windowed(q, k, v, step)
        self.keep(k, v, step)
        group, partition = self.state.cp_group, step.partition
        out = q.new_zeros(q.shape, dtype=torch.float32)
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float32)
        kv = torch.stack((k, v))
        for turn in range(group.size()):
            source, following = ((group.rank() - turn - ahead) % group.size() for ahead in (0, 1))
            arriving, works = kv, []
            if turn < group.size() - 1:
                arriving = kv.new_empty(2, partition.tokens_of(following), *kv.shape[2:])
                works = self._pass_on(kv, arriving)
            for rows, keys, causal in visible_spans(step.block, partition.ranks[source][0]):
                partial = self.state.kernel.decode(q[rows], kv[0, keys], kv[1, keys], self.scale, causal)
                out[rows], lse[rows] = merge_partials(
                    torch.stack((out[rows], partial[0])), torch.stack((lse[rows], partial[1]))
                )
            for work in works:
                work.wait()
            kv = arriving
        return (out if self.softmax_offset is None else with_sinks(out, lse, self.softmax_offset)).to(q.dtype)

    def _pass_on(self, kv: Tensor, arriving: Tensor) -> list[dist.Work]:
        """Start sending `kv` to the next rank and receiving from the one before; empty shards do not travel."""
        group = self.state.cp_group
        after, before = ((group.rank() + way) % group.size() for way in (1, -1))
        operations = []
        if kv.numel():
            operations.append(dist.P2POp(dist.isend, kv, group=group, group_peer=after))
        if arriving.numel():
            operations.append(dist.P2POp(dist.irecv, arriving, group=group, group_peer=before))
        return dist.batch_isend_irecv(operations) if operations else []


def visible_spans(queries: Block, keys: Block) -> list[tuple[slice, slice, bool]]:
    """Which rows of one rank's queries see which rows of a rank's K/V: (query rows, key rows, causal).

    Both blocks' spans are in order, so a span of queries sees the spans of keys up to itself, a prefix; where it meets
    itself attention is causal, aligned to the bottom right. Neighbours that see the same prefix go together.
    """
    seen_by = []
    row = 0
    for start, stop in queries.spans:
        seen = sum(end - begin for begin, end in keys.spans if begin <= start and end <= stop)
        causal = (start, stop) in keys.spans
        if stop > start and seen:
            seen_by.append((row, row + stop - start, seen, causal))
        row += stop - start
    grouped = []
    for (seen, causal), run in groupby(seen_by, key=lambda rows: rows[2:]):
        if causal:
            grouped += [(slice(first, last), slice(0, seen), True) for first, last, *_ in run]
        else:
            rows = list(run)
            grouped.append((slice(rows[0][0], rows[-1][1]), slice(0, seen), False))
    return grouped
