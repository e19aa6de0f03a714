"""The socket of Megatron's layer spec: what every attention kind shares.

A kind is a `CoreAttention` with its own `prefill`. Decode is the same for all kinds, because all leave the context's
K/V sharded over the cp ranks: every rank attends to the keys it holds, the results are merged by log-sum-exp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_star.attention.anchor import SharedAnchor
from nemo_star.attention.cache import KVCache
from nemo_star.attention.merge import merge_over_group
from nemo_star.kernels.registry import Kernel
from nemo_star.methods.partition import Block, Partition


@dataclass
class AttentionState:
    """What the attention layers of one model share, and the engine steers.

    It reaches the layers through their constructor (`functools.partial` in the layer spec), not through the
    TransformerConfig, which Megatron may copy.
    """

    cache: KVCache
    kernel: Kernel
    """Computes in the model's type: prefill."""
    decode_kernel: Kernel
    """Computes in the cache's type."""
    cp_group: dist.ProcessGroup
    partition: Partition | None = None
    """How the context in prefill is dealt out; exact kinds exchange K/V or heads by it."""
    anchor: SharedAnchor | None = None
    """Star with `anchor=shared`: the anchor's K/V while the context is in prefill."""
    block: Block | None = None
    """The block that prefill is encoding; None means decode."""
    decode_group: dist.ProcessGroup | None = None
    """tp x cp, whose ranks share the work of a token (`decode_sharding.py`); None: every cp rank does all of it."""
    caches_new_tokens: bool = True
    """Decode: K/V of the tokens in flight are cached on this rank (on exactly one rank of the cp group)."""


class CoreAttention(nn.Module):
    """Megatron's `core_attention`: q [sq, b, np, hn], k and v [sk, b, ng, hn] -> [sq, b, np * hn].

    K arrives rotated. Masks, biases and packed sequences of the caller are not used: what a token sees follows from the
    phase alone.
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
        block = self.state.block
        out = self.decode(q, k, v) if block is None else self.prefill(q, k, v, block)
        return out.flatten(start_dim=2)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        """Attend within the context; cache K/V of this rank's share. Returns [sq, b, np, hn]."""
        raise NotImplementedError

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to every cached token on every cp rank, and causally to the new tokens (paper section 2.2)."""
        state = self.state
        if state.caches_new_tokens:
            state.cache.append(self.layer_number, k, v)
        cached = state.cache.get(self.layer_number)
        keys, values = cached if cached is not None else (k[:0], v[:0])
        out, lse = state.decode_kernel.decode(
            q.to(keys.dtype), keys, values, self.scale, causal=state.caches_new_tokens
        )
        return merge_over_group(out, lse, state.cp_group).to(q.dtype)
