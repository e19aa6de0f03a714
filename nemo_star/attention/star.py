"""Star Attention: anchored local prefill, global decode (arXiv 2411.17116, section 2)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_star.attention.anchor import SharedAnchor
from nemo_star.attention.cache import KVCache, KVShape
from nemo_star.attention.core import CoreAttention
from nemo_star.attention.step import Handover, PrefillStep
from nemo_star.methods.method import Method
from nemo_star.methods.partition import Block, Partition, length
from nemo_star.methods.star import Star


class StarAttention(CoreAttention):
    """Phase 1 of the paper: a block attends causally to itself, and in full to the anchor before it. Tokens that it
    overlaps with are in flight right before its own, and not kept.

    Either the anchor's tokens are in flight with the block, as the paper has it (`anchor=recompute`: the tokens are
    [anchor | block] and only the block's K/V are kept), or its K/V come from the rank that computed them
    (`anchor=shared`: only the block's tokens are in flight). A windowed layer has no anchor: a block sees the tokens
    right before it.
    """

    @classmethod
    def handover(
        cls,
        method: Method,
        partition: Partition,
        group: dist.ProcessGroup,
        *,
        shape: KVShape,
        layer_numbers: Sequence[int],
        cache: KVCache,
    ) -> Handover | None:
        """The anchor's K/V, where later blocks want them; None where each computes its own."""
        assert isinstance(method, Star)
        anchor_size = method.sizes(partition.context_tokens)[1]
        blocks = [block for blocks in partition.ranks for block in blocks]
        if not method.shares_anchor or not any(block.sees for block in blocks):
            return None
        return SharedAnchor(
            group,
            shape,
            tokens=anchor_size,
            layer_numbers=layer_numbers,
            blocks_left=sum(block.index > 0 for block in partition.ranks[group.rank()]),
            ahead=not method.in_rounds,
            cached=None if any(block.index == 0 for block in blocks) else cache,
        )

    @classmethod
    def inputs(cls, method: Method, block: Block, context_ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """[anchor | overlap | block], or without the anchor; its content and positions as in the paper's ablation
        (table 3)."""
        assert isinstance(method, Star)
        ids, positions = super().inputs(method, block, context_ids, vocab_size)
        anchor_size = 0 if method.shares_anchor else length(block.sees)
        if not anchor_size:
            return ids, positions
        settings, start = method.settings, block.spans[0][0]
        first = context_ids[:anchor_size]
        seen = ids[:anchor_size] if settings.anchor_content == "previous" else first
        anchor_ids = _content(settings.anchor_content, seen, vocab_size, _drawn_from(first, 0))
        anchor_positions = _positions(settings.anchor_positions, start, anchor_size, _drawn_from(first, block.index))
        own = slice(anchor_size, None)
        return torch.cat((anchor_ids, ids[own])), torch.cat((anchor_positions, positions[own]))

    def accompany(self, step: PrefillStep, like: Tensor) -> None:
        if self.window is not None:
            assert step.preceding is not None
            step.preceding.before(self.layer_number, like, like, step.number)
        elif isinstance(step.handover, SharedAnchor):
            step.handover.pass_by(self.layer_number)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, step: PrefillStep) -> Tensor:
        again = k.shape[0] - step.block.tokens  # the overlap, and the anchor where each block recomputes it
        if self.window is not None:
            anchor = again - length(step.block.overlap)
            out = self.prefill_windowed(q[anchor:], k[anchor:], v[anchor:], step)
            return torch.cat((self.attend(q[:anchor], k[:anchor], v[:anchor]), out)) if anchor else out
        self.keep(k[again:], v[again:], step)
        if isinstance(step.handover, SharedAnchor):
            if step.block.index == 0:
                step.handover.give(self.layer_number, k, v)
            else:
                anchor_k, anchor_v = step.handover.take(self.layer_number)
                k, v = torch.cat((anchor_k, k)), torch.cat((anchor_v, v))
        return self.attend(q, k, v)


def _content(kind: str, tokens: Tensor, vocab_size: int, generator: torch.Generator) -> Tensor:
    """The anchor's token ids, `tokens` [A] being those that it would have; the same for every block."""
    if kind == "constant":  # the paper's were a blank, " the" or a full stop: frequent ones
        values, counts = tokens.unique(return_counts=True)
        return values[counts.argmax()].expand(len(tokens))
    if kind == "random":
        return torch.randint(vocab_size, tokens.shape, generator=generator, dtype=tokens.dtype)
    if kind == "shuffled":
        return tokens[torch.randperm(len(tokens), generator=generator)]
    return tokens


def _positions(kind: str, start: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` position ids of the anchor of the block that starts at `start`. Random ones ascend, none twice, so that
    the anchor's tokens keep their order."""
    if kind == "previous":
        return torch.arange(start - count, start)
    if kind == "random":
        return torch.randperm(start, generator=generator)[:count].sort().values
    return torch.arange(count)


def _drawn_from(tokens: Tensor, number: int) -> torch.Generator:
    """What draws the same on all ranks and at all layouts: seeded by what the anchor would be, and a number."""
    return torch.Generator().manual_seed(zlib.crc32(tokens.numpy().tobytes(), number))
