"""Attention mass: which share of a token's softmax lies on which keys, by layer and head.

Computed in float32 from the queries and keys that the layers of the running model have (`AttentionState.observer`), for
a sample of query positions, so that what it costs is bounded. Windowed layers see the same tokens under every method:
they are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_star.attention.core import CoreAttention
from nemo_star.attention.step import AttentionState, DecodeStep, PrefillStep

_SCORES = 2**24
"""Of one product of queries and keys: 64 MiB in float32, and twice that of sums in float64."""


@dataclass(frozen=True)
class Rows:
    """Some queries of a layer, and what they see."""

    positions: Tensor
    """[rows] int64, in order."""
    keys: Tensor
    """[sk] int64, positions of keys, ascending."""
    below: Tensor
    """[np, rows, sk + 1] float64: mass on the first i keys."""

    def mass(self, edges: Iterable[int]) -> Tensor:
        """[np, rows, len(edges) - 1]: on keys at positions from each edge up to the next one."""
        at = torch.searchsorted(self.keys, torch.tensor(list(edges), device=self.keys.device))
        return self.below[..., at].diff(dim=-1)

    def between(self, start: int, stop: int) -> Rows:
        """The queries at positions [start, stop)."""
        first, last = torch.searchsorted(self.positions, torch.tensor([start, stop], device=self.positions.device))
        return Rows(self.positions[first:last], self.keys, self.below[:, first:last])


Take = Callable[[int, Rows], None]
"""(layer number, rows of it): reduces them to what is wanted."""


class Mass:
    """Observer of the passes of one context: hands rows to `take`, a part of them at a time.

    Args:
        rows: positions of queries that are encoded, [rows] int64 on CPU, ascending; None: none of them.
        decoded: whether to take the tokens of decode steps that hang on a step's first context, which lies whole on one
            cp rank.
    """

    def __init__(self, state: AttentionState, take: Take, rows: Tensor | None = None, *, decoded: bool = False) -> None:
        self._state = state
        self._take = take
        self._rows = rows
        self._decoded = decoded

    def prefilled(self, layer: CoreAttention, q: Tensor, k: Tensor) -> None:
        """As of `Observer`: rows of the block's own tokens."""
        step = self._state.step
        if self._rows is None or layer.window is not None or not isinstance(step, PrefillStep):
            return
        spans = (*step.block.sees, *step.block.widened)
        keys = torch.cat([torch.arange(start, stop) for start, stop in spans])
        own = keys[keys.shape[0] - step.block.tokens :]
        wanted = self._rows[torch.isin(self._rows, own)]
        if not len(wanted):
            return
        among = torch.searchsorted(own, wanted) + q.shape[0] - step.block.tokens
        self._measure(layer, q[among.to(q.device)], k, wanted, keys)

    def decoded(self, layer: CoreAttention, q: Tensor, lse: Tensor, step: DecodeStep) -> None:
        """As of `Observer`: all rows of the first context."""
        together = step.contexts[0]
        cached = together.context.get(layer.layer_number)
        if not self._decoded or layer.window is not None or cached is None:
            return
        keys, rows = cached[0], slice(together.start, together.stop)
        first = together.sequences[0].position
        positions = torch.arange(first, first + together.stop - together.start)
        self._measure(layer, q[rows], keys, positions, torch.arange(keys.shape[0]), lse=lse[rows])

    def _measure(
        self, layer: CoreAttention, q: Tensor, k: Tensor, positions: Tensor, keys: Tensor, *, lse: Tensor | None = None
    ) -> None:
        """Rows in parts whose scores fit into memory."""
        positions, keys = positions.to(q.device), keys.to(q.device)
        size = max(1, _SCORES // (q.shape[2] * k.shape[0]))
        for start in range(0, q.shape[0], size):
            part = slice(start, start + size)
            total = None if lse is None else lse[part, 0].t()
            below = _cumulative(layer, q[part, 0], k[:, 0], keys <= positions[part, None], total)
            self._take(layer.layer_number, Rows(positions[part], keys, below))


def _cumulative(layer: CoreAttention, q: Tensor, k: Tensor, visible: Tensor, total: Tensor | None) -> Tensor:
    """[np, rows, sk + 1] float64 from q [rows, np, hn], k [sk, ng, hn], visible [rows, sk]; `total` [np, rows] is the
    log-sum-exp over all keys, where these are not all."""
    of_groups = q.float().unflatten(1, (k.shape[1], -1)).unbind(1)
    # A group at a time: all keys of a long context in float32 would be as large as their cache, or larger.
    scores = torch.cat([torch.einsum("qnh,kh->nqk", of_group, k[:, g].float()) for g, of_group in enumerate(of_groups)])
    scores = (scores * layer.scale).masked_fill_(~visible, float("-inf"))
    if total is None:
        total = scores.logsumexp(dim=-1)
    if layer.softmax_offset is not None:  # a sink is one more score, on no key
        total = torch.logaddexp(total, layer.softmax_offset.float()[:, None])
    shares = torch.exp(scores - total[..., None]).double()
    return torch.nn.functional.pad(shares.cumsum(dim=-1), (1, 0))


@contextmanager
def observed(state: AttentionState, take: Take, rows: Tensor | None = None, *, decoded: bool = False) -> Iterator[None]:
    """While this lasts, what is encoded or decoded goes to `take` on the ranks that have it; arguments as of `Mass`."""
    state.observer, state.completes_prefill = Mass(state, take, rows, decoded=decoded), True
    try:
        yield
    finally:
        state.observer, state.completes_prefill = None, False
