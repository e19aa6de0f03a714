"""The anchor's K/V, computed once and handed to the other cp ranks.

The anchor's tokens see only each other, so their hidden states are the same wherever they are computed. The rank that
holds block 0 (cp rank 0) broadcasts each layer's anchor K/V as soon as they exist; the others have the receive under
way while they compute, and wait only where attention needs the keys. One broadcast a layer and cp group; every rank
takes part in each, in the order of the layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_star.attention.cache import KVCache, KVShape

MAX_OPEN = 2
"""Layers whose anchor is on its way at the same time; `methods.star.Star.kept_bytes` plans for as many."""


class SharedAnchor:
    """The anchor of one context on one rank.

    Args:
        tokens: anchor size A.
        layer_numbers: this pipeline stage's layers, in order.
        blocks_left: blocks that will still ask for the anchor on this rank; then a layer's K/V are freed.
        cached: of a context that goes on: where cp rank 0 has block 0, which is not encoded again.
        ahead: receives are put under way before they are asked for. Not where ranks exchange other things over this
            group between two layers: NCCL carries out a group's exchanges in the order in which each rank asks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        shape: KVShape,
        *,
        tokens: int,
        layer_numbers: Sequence[int],
        blocks_left: int,
        ahead: bool = True,
        cached: KVCache | None = None,
    ) -> None:
        self.tokens = tokens
        self.waited_seconds = 0.0
        self._group = group
        self._shape = shape
        self._layers = list(layer_numbers)
        self._uses = dict.fromkeys(layer_numbers, blocks_left)
        self._kv: dict[int, Tensor] = {}
        self._works: dict[int, dist.Work] = {}
        self._ahead = ahead
        self._cached = cached
        self._given: set[int] = set()
        self._expected = 0
        if group.rank() > 0 and ahead:
            self._expect()

    def give(self, layer_number: int, k: Tensor, v: Tensor) -> None:
        """On cp rank 0, in block 0: start handing out the first A tokens of k, v [sk, b, ng, hn]."""
        self._given.add(layer_number)
        if not self._uses[layer_number]:
            self._drop_oldest()
        packed = torch.stack([x[: self.tokens].to(self._shape.dtype) for x in (k, v)])
        if self._group.size() > 1:
            self._works[layer_number] = dist.broadcast(packed, group=self._group, group_src=0, async_op=True)
        if self._uses[layer_number]:
            self._kv[layer_number] = packed

    def _drop_oldest(self) -> None:
        """Leave one broadcast under way, beside the one that comes next, where nobody here wants what is handed out.

        A work holds its tensor until it is waited for, and a host that runs ahead of its GPU never sees it completed:
        all layers would be kept. On NCCL it is the GPU's queue that waits, not the host, and torch lets the tensor go
        then (from 2.8 on, pull request 150398; before, when the allocator sees that the device has come so far).
        """
        while len(self._works) >= MAX_OPEN:
            self._arrived(next(iter(self._works)))

    def take(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """The anchor's k, v, each [A, b, ng, hn]; waits for them where they are still on their way."""
        self._have(layer_number)
        kv = self._kv[layer_number]
        self._uses[layer_number] -= 1
        if self._uses[layer_number] == 0:
            del self._kv[layer_number]
        return kv[0], kv[1]

    def pass_by(self, layer_number: int) -> None:
        """Take part in handing out a layer's anchor that this rank has no block for: others may get it through it."""
        self._have(layer_number)
        if not self._uses[layer_number]:
            self._kv.pop(layer_number, None)

    def _have(self, layer_number: int) -> None:
        """Have a layer's anchor come, or hand it out from the cache."""
        if self._group.rank() > 0:
            self._arrived(layer_number)
        elif self._cached is not None and layer_number not in self._given:
            cached = self._cached.get(layer_number)
            assert cached is not None
            self.give(layer_number, *cached)

    def finish(self) -> None:
        """After the last round: end what is under way, free everything."""
        for layer_number in self._layers:
            self._arrived(layer_number)
            self._kv.pop(layer_number, None)

    def _arrived(self, layer_number: int) -> None:
        """Wait for a layer's broadcast; on a receiver, put the next layer's under way."""
        receives = self._group.rank() > 0
        if receives and self._layers[self._expected : self._expected + 1] == [layer_number]:
            self._expect()
        work = self._works.pop(layer_number, None)
        if work is None:
            return
        started = time.perf_counter()
        work.wait()
        self.waited_seconds += time.perf_counter() - started
        if receives and self._ahead:
            self._expect()

    def _expect(self) -> None:
        """Start the receive of the next layer, if there is one."""
        if self._expected < len(self._layers):
            shape = self._shape
            size = (2, self.tokens, shape.batch, shape.groups, shape.channels)
            layer_number = self._layers[self._expected]
            self._expected += 1
            self._kv[layer_number] = torch.empty(size, dtype=shape.dtype, device=shape.device)
            self._works[layer_number] = dist.broadcast(
                self._kv[layer_number], group=self._group, group_src=0, async_op=True
            )
