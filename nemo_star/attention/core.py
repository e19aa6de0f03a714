"""The socket of Megatron's layer spec: what every attention method shares.

A method is a `CoreAttention` with its own `prefill`. Decode is the same for all, because all leave the context's K/V
sharded over the cp ranks: every rank attends to the keys it holds, the results are merged by log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_star.attention.cache import KVCache, KVShape
from nemo_star.attention.merge import merge_over_group
from nemo_star.attention.step import AttentionState, DecodeStep, Handover, PrefillStep
from nemo_star.methods.method import Method
from nemo_star.methods.partition import Partition

Partial = tuple[Tensor, Tensor]
"""out [sq, b, np, hn] and lse [sq, b, np], float32: attention over some of the keys."""


class CoreAttention(nn.Module):
    """Megatron's `core_attention`: q [sq, b, np, hn], k and v [sk, b, ng, hn] -> [sq, b, np * hn].

    K arrives rotated. Masks, biases and packed sequences of the caller are not used: what a token sees follows from the
    step alone.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        state: AttentionState,
        softmax_scale: float | None = None,
        **_: Any,  # attn_mask_type, attention_type, cp_comm_type, pg_collection: they differ between Megatron releases
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.state = state
        self.scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, /, **_: Any) -> Tensor:
        step = self.state.step
        assert step is not None, "the engine sets the step before each forward pass"
        if self.state.query_scale is not None:
            q = q * self.state.query_scale.to(q.dtype)
        out = self.prefill(q, k, v, step) if isinstance(step, PrefillStep) else self.decode(q, k, v, step)
        return out.flatten(start_dim=2)

    @classmethod
    def handover(
        cls,
        method: Method,
        partition: Partition,
        group: dist.ProcessGroup,
        *,
        shape: KVShape,
        layer_numbers: Sequence[int],
    ) -> Handover | None:
        """What one prefill hands between the ranks of the cp group, or from block to block; None: nothing that lasts.

        Args:
            shape: of a layer's K on this rank.
            layer_numbers: of this pipeline stage.
        """
        return None

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, step: PrefillStep) -> Tensor:
        """Attend within the context; cache K/V of the block's own tokens. Returns [sq, b, np, hn]."""
        raise NotImplementedError

    def accompany(self, step: PrefillStep) -> None:
        """Take part in what a layer hands from rank to rank for blocks of other ranks, where this one has no more and
        ranks go through their blocks in step."""

    def decode(self, q: Tensor, k: Tensor, v: Tensor, step: DecodeStep) -> Tensor:
        """Attend to every cached token of the context on every cp rank, and causally to the sequence's own (paper
        section 2.2). Returns [sq, b, np, hn]."""
        over_context, over_own = [], []
        for rows in step.sequences:
            mine = slice(rows.start, rows.stop)
            if rows.caches_own:
                rows.own.append(self.layer_number, k[mine], v[mine])
            over_context.append(self._attend(q[mine], rows.context, k, causal=False))
            over_own.append(self._attend(q[mine], rows.own, k, causal=rows.caches_own))
        partials = [_joined(over_context), _joined(over_own)]
        outs, lses = (torch.stack(tensors) for tensors in zip(*partials, strict=True))
        return merge_over_group(outs, lses, self.state.cp_group).to(q.dtype)

    def _attend(self, q: Tensor, cache: KVCache, like: Tensor, *, causal: bool) -> Partial:
        """Over what one cache holds of this layer; without any key out 0, lse -inf."""
        cached = cache.get(self.layer_number)
        keys, values = cached if cached is not None else (like[:0], like[:0])
        return self.state.decode_kernel.decode(q.to(keys.dtype), keys, values, self.scale, causal)


def _joined(partials: list[Partial]) -> Partial:
    """Of sequences one after the other."""
    if len(partials) == 1:
        return partials[0]
    outs, lses = zip(*partials, strict=True)
    return torch.cat(outs), torch.cat(lses)
