"""Star with a summary in the anchor's place (methods/summary.py): which chunks are chosen, and who sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_star.attention.anchor import SharedAnchor
from nemo_star.attention.star import StarAttention
from nemo_star.attention.step import PrefillStep
from nemo_star.methods.method import Method
from nemo_star.methods.partition import Block, length
from nemo_star.methods.summary import Summary

_IDF_SCALE = 4096
"""Frequencies are weighed in whole numbers, so that all machines choose alike."""


class SummaryAttention(StarAttention):
    """A block attends causally to itself, and in full to the summary's tokens before it.

    The summary's tokens are in flight with block 0, before its own, and each layer's K/V of them go to the other ranks
    as the anchor's do. They ascend and see only each other, causally, so what a block sees is the beginning of them.
    """

    @classmethod
    def inputs(cls, method: Method, block: Block, context_ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """The block; block 0: [summary | block]."""
        assert isinstance(method, Summary)
        positions = torch.arange(*block.spans[0])
        if block.index == 0 and block.sees:
            positions = torch.cat((summary_positions(method, context_ids), positions))
        return context_ids[positions], positions

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, step: PrefillStep) -> Tensor:
        beside = k.shape[0] - step.block.tokens  # the summary, with block 0
        own = slice(beside, None)
        self.keep(k[own], v[own], step)
        if not isinstance(step.handover, SharedAnchor):
            return self.attend(q, k, v)
        if step.block.index == 0:
            step.handover.give(self.layer_number, k, v)
            summary = slice(beside)
            return torch.cat((self.attend(q[summary], k[summary], v[summary]), self.attend(q[own], k[own], v[own])))
        seen = slice(length(step.block.sees))
        summary_k, summary_v = step.handover.take(self.layer_number)
        return self.attend(q, torch.cat((summary_k[seen], k)), torch.cat((summary_v[seen], v)))


def summary_positions(method: Summary, context_ids: Tensor) -> Tensor:
    """Positions of the summary's tokens, ascending, int64: the sink, and of each block the best of its chunks.

    A chunk is as good as the rarest of its tokens, by the number of chunks that have it (inverse document frequency;
    blocks would be too few documents: of four, half a text's words are in one alone), and among equals as the sum over
    its tokens; the first of those that are still equal.

    Args:
        context_ids: [tokens] int32.
    """
    tokens = len(context_ids)
    size, (block_size, _), sink = method.settings.chunk_size, method.sizes(tokens), method.sink(tokens)
    starts = [
        range(max(start, sink), min(start + block_size, tokens) - size + 1, size)
        for start in range(0, tokens, block_size)
    ]
    firsts = torch.tensor([start for of_block in starts for start in of_block], dtype=torch.int64)
    chunks = firsts[:, None] + torch.arange(size)
    scores = _scores(context_ids[chunks])
    chosen, first = [torch.arange(sink)], 0
    for number, of_block in enumerate(starts):
        here = slice(first, first + len(of_block))
        count = method.chunks_before(number + 1, tokens) - method.chunks_before(number, tokens)
        best = scores[here].argsort(descending=True, stable=True)[:count].sort().values
        chosen.append(chunks[here][best].flatten())
        first = here.stop
    return torch.cat(chosen)


def _scores(chunks: Tensor) -> Tensor:
    """Of each of chunks [number, size]: its largest idf first, then the sum of those of its different tokens; int64."""
    ordered = chunks.long().sort(dim=1).values
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    frequency = ordered[is_new].bincount()
    idf = (_IDF_SCALE * (len(chunks) / frequency[ordered].double()).log()).round().long()
    sums = (idf * is_new).sum(dim=1)
    return idf.amax(dim=1) * 2**40 + sums
