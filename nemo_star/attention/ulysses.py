"""DeepSpeed-Ulysses: exact, heads instead of sequence by all-to-all (arXiv 2309.14509).

Each cp rank holds a contiguous span of the context with all heads. For attention an all-to-all gives it the whole
sequence of a share of the query heads, with the KV heads these need; a second one brings the output back. What stays
cached is the rank's own span with all KV heads, so decode is every method's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_star.attention.core import CoreAttention
from nemo_star.attention.step import PrefillStep
from nemo_star.methods.partition import Partition


class UlyssesAttention(CoreAttention):
    """Exact causal attention over the whole context, sharded over heads."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, step: PrefillStep) -> Tensor:
        self.keep(k, v, step)
        cp_size = self.state.cp_group.size()
        heads = [_share(q.shape[2], rank, cp_size) for rank in range(cp_size)]
        groups = [_share(k.shape[2], rank, cp_size) for rank in range(cp_size)]
        whole_q = self._to_heads(q, heads, step.partition)
        whole_k, whole_v = (self._to_heads(x, groups, step.partition) for x in (k, v))
        out = self.attend(whole_q, whole_k, whole_v, heads[self.state.cp_group.rank()])
        return self._to_sequence(out, q.shape[0], step.partition)

    def _to_heads(self, x: Tensor, heads: list[slice], partition: Partition) -> Tensor:
        """[tokens of this rank, b, heads, hn] -> [all tokens, b, this rank's heads, hn]."""
        group = self.state.cp_group
        sent = [x[:, :, share].reshape(-1) for share in heads]
        mine = heads[group.rank()]
        shape = (x.shape[1], mine.stop - mine.start, x.shape[3])
        row = shape[0] * shape[1] * shape[2]
        received = x.new_empty(partition.context_tokens * row)
        dist.all_to_all_single(
            received,
            torch.cat(sent),
            output_split_sizes=[partition.tokens_of(rank) * row for rank in range(group.size())],
            input_split_sizes=[x.numel() for x in sent],
            group=group,
        )
        return received.view(partition.context_tokens, *shape)

    def _to_sequence(self, out: Tensor, tokens: int, partition: Partition) -> Tensor:
        """[all tokens, b, this rank's heads, hn] -> [tokens of this rank, b, heads, hn]."""
        group = self.state.cp_group
        row = out[0].numel()
        received = out.new_empty(group.size() * tokens * row)
        dist.all_to_all_single(
            received,
            out.reshape(-1),
            output_split_sizes=[tokens * row] * group.size(),
            input_split_sizes=[partition.tokens_of(rank) * row for rank in range(group.size())],
            group=group,
        )
        by_rank = received.view(group.size(), tokens, *out.shape[1:])
        return by_rank.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _share(heads: int, cp_rank: int, cp_size: int) -> slice:
    """The heads that a rank works on; KV heads fewer than ranks are shared by neighbouring ranks."""
    if heads >= cp_size:
        return slice(cp_rank * heads // cp_size, (cp_rank + 1) * heads // cp_size)
    return slice(cp_rank * heads // cp_size, cp_rank * heads // cp_size + 1)
