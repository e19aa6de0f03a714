"""The socket of Megatron's layer spec: what every attention method shares.

A method is a `CoreAttention` with its own `prefill`. Decode is the same for all, because all leave the context's K/V
sharded over the cp ranks: every rank attends to the keys it holds, the results are merged by log-sum-exp.

A windowed layer (`TransformerConfig.window_size`) is a window under every method: a token sees itself and the
`window - 1` before it, on whatever ranks these are. Of the context it caches what a query can see (the last
`window - 1` tokens) and what goes on needs. A sink (`softmax_type`) enters each softmax once, when all of it is merged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_star.attention.cache import KVCache, KVShape
from nemo_star.attention.fixed import FixedStep
from nemo_star.attention.merge import merge_over_group
from nemo_star.attention.step import AttentionState, DecodeStep, Handover, PrefillStep, SequenceRows
from nemo_star.kernels.math import attend_at
from nemo_star.kernels.merge import with_sinks
from nemo_star.kernels.stored import attend_stored, is_fp8
from nemo_star.methods.method import Method
from nemo_star.methods.partition import Block, Partition, Span, clipped, length

Partial = tuple[Tensor, Tensor]
"""out [sq, b, np, hn] and lse [sq, b, np], float32: attention over some of the keys."""

MAX_RAGGED_NUMBERS = 2**18
"""In K of several sequences, each counted as the longest: up to it copying them beside each other is no loss."""


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
        pg_collection: Any = None,
        **_: Any,  # attn_mask_type, attention_type, cp_comm_type: they differ between Megatron releases
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.state = state
        self.scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.window = window_of(config, layer_number)
        self.is_last = layer_number == config.num_layers
        self.groups = pg_collection
        self.softmax_offset: Tensor | None  # sinks [np], named as Megatron's core attention has them
        self._make_sinks(config)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, /, **_: Any) -> Tensor:
        step = self.state.step
        assert step is not None, "the engine sets the step before each forward pass"
        scale = self.state.query_scale if self.window is None else self.state.windowed_query_scale
        if scale is not None:
            q = q * scale.to(q.dtype)
        if isinstance(step, DecodeStep):
            out = self.decode(q, k, v, step)
        elif self.only_caches:
            again = k.shape[0] - step.block.tokens
            self.keep(k[again:], v[again:], step)
            out = torch.zeros_like(q)
        else:
            out = self.prefill(q, k, v, step)
        return out.flatten(start_dim=2)

    @property
    def only_caches(self) -> bool:
        """Whether nobody reads what this layer gives in prefill: of the last one, K/V are all that is wanted."""
        return self.is_last and not self.state.completes_prefill

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
        """What one prefill hands between the ranks of the cp group, or from block to block; None: nothing that lasts.

        Args:
            partition: the blocks that are encoded; of a context that goes on, the new ones.
            shape: of a layer's K on this rank.
            layer_numbers: of this pipeline stage, those that are not windowed and whose results are read.
            cache: what this rank holds of the context already.
        """
        return None

    @classmethod
    def inputs(cls, method: Method, block: Block, context_ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """What runs through the layers for a block, its own tokens last: ids [s] int32 and position ids [s] int64, on
        CPU, `method.tokens_in_flight(block)` of them. It follows from the arguments alone: ranks ask on their own.

        Args:
            context_ids: [tokens] int32, of the whole context.
            vocab_size: the model's.
        """
        positions = torch.cat([torch.arange(start, stop) for start, stop in method.in_flight(block)])
        return context_ids[positions], positions

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, step: PrefillStep) -> Tensor:
        """Attend within the context; cache K/V of the block's own tokens. Returns [sq, b, np, hn]."""
        raise NotImplementedError

    def keep(self, k: Tensor, v: Tensor, step: PrefillStep) -> None:
        """Cache the K/V [tokens, b, ng, hn] of the block's own tokens: those that queries will look at."""
        if self.window is None:
            step.cache.append(self.layer_number, k, v)
            return
        assert step.preceding is not None
        near = length(clipped(step.block.spans, step.preceding.cached_from, step.partition.context_tokens))
        first = k.shape[0] - near
        step.cache.append(self.layer_number, k[first:], v[first:], of=k.shape[0])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: slice = slice(None)) -> Tensor:
        """Causal attention, aligned to the bottom right, in this layer's window and with its sinks; of q's type.

        Args:
            heads: of this rank's, those that q has.
        """
        kernel = self.state.kernel
        if self.state.observer is not None:
            self.state.observer.prefilled(self, q, k)
        if self.softmax_offset is None:
            return kernel.prefill(q, k, v, self.scale, self.window)
        out, lse = kernel.decode(q, k, v, self.scale, True, self.window)
        return with_sinks(out, lse, self.softmax_offset[heads]).to(q.dtype)

    def prefill_windowed(self, q: Tensor, k: Tensor, v: Tensor, step: PrefillStep) -> Tensor:
        """Prefill of a windowed layer, the same under every method whose ranks have spans with all heads: q, k and v of
        the block's own tokens, and of those that it overlaps with before them."""
        assert step.preceding is not None
        own = slice(k.shape[0] - step.block.tokens, None)
        before = step.preceding.before(self.layer_number, k[own], v[own], step.number)
        self.keep(k[own], v[own], step)
        outs, start = [q[:0]], 0
        for (first, last), (keys, values) in zip(_filled(step), before, strict=True):
            rows = slice(start, start + last - first)
            outs.append(self.attend(q[rows], torch.cat((keys, k[rows])), torch.cat((values, v[rows]))))
            start = rows.stop
        return torch.cat(outs)

    def accompany(self, step: PrefillStep, like: Tensor) -> None:
        """Take part in what a layer hands from rank to rank for blocks of other ranks, where this one has no more and
        ranks go through their blocks in step; `like` is the K of no tokens."""

    def decode(self, q: Tensor, k: Tensor, v: Tensor, step: DecodeStep) -> Tensor:
        """Attend to every cached token of the context on every cp rank, and causally to the sequence's own (paper
        section 2.2). Returns [sq, b, np, hn]."""
        over_context, over_own = [], []
        if isinstance(step, FixedStep):
            over_own.append(step.attend_own(self.layer_number, q, k, v, self.scale))
        for together in step.contexts:
            at_once = self.window is None and self._takes_at_once(k, together.sequences)
            for rows in together.sequences:
                mine = slice(rows.start, rows.stop)
                if rows.caches_own:
                    rows.own.append(self.layer_number, k[mine], v[mine])
                if rows.near is not None and self.window is not None:
                    over_context.append(self._attend_near(q[mine], together.context, rows.near.context, rows))
                    over_own.append(self._attend_near(q[mine], rows.own, rows.near.own, rows))
                elif not at_once:
                    over_own.append(self._attend_all(q[mine], rows.own, causal=rows.caches_own))
            if at_once:
                over_own.append(self._attend_ragged(q, k, together.sequences))
            if self.window is None:
                every = slice(together.start, together.stop)
                over_context.append(self._attend_all(q[every], together.context, causal=False))
        partials = [_joined(over_context), _joined(over_own)]
        outs, lses = (torch.stack(tensors) for tensors in zip(*partials, strict=True))
        out, lse = merge_over_group(
            outs, lses, self.state.cp_group, merge=self.state.merge, sinks=self.softmax_offset, dtype=q.dtype
        )
        if self.state.observer is not None:
            self.state.observer.decoded(self, q, lse, step)
        return out

    def _takes_at_once(self, k: Tensor, sequences: tuple[SequenceRows, ...]) -> bool:
        """Whether these attend to their own tokens in one call: the kernel has one, each has one token (one that comes
        twice must not see its later one), and what is copied for it is little; `k` is the step's."""
        caches = {id(rows.own): rows.own for rows in sequences}
        return (
            hasattr(self.state.decode_kernel, "decode_ragged")
            and not is_fp8(self.state.cache_dtype)
            and 1 < len(sequences) == len(caches)
            and all(rows.stop - rows.start == 1 for rows in sequences)
            and (1 + max(cache.tokens for cache in caches.values())) * len(caches) * k[0].numel() <= MAX_RAGGED_NUMBERS
        )

    def _attend_ragged(self, q: Tensor, k: Tensor, sequences: tuple[SequenceRows, ...]) -> Partial:
        """A token of each of these sequences over its own tokens; `k`, the step's, is of their shape."""
        nothing = k.new_empty(0, *k.shape[1:], dtype=self.state.cache_dtype)
        kept = [rows.own.get(self.layer_number) or (nothing, nothing) for rows in sequences]
        keys, values = ([x[:, 0] for x in tensors] for tensors in zip(*kept, strict=True))
        queries = q[sequences[0].start : sequences[-1].stop, 0].to(self.state.cache_dtype)
        out, lse = self.state.decode_kernel.decode_ragged(queries, keys, values, self.scale)  # type: ignore[attr-defined]
        return out[:, None], lse[:, None]

    def _attend_all(self, q: Tensor, cache: KVCache, *, causal: bool) -> Partial:
        """Over what one cache holds of this layer; without any key out 0, lse -inf."""
        keys, values = self._cached(cache, q)
        return attend_stored(self.state.decode_kernel, q, keys, values, self.scale, causal)

    def _attend_near(self, q: Tensor, cache: KVCache, positions: Tensor, rows: SequenceRows) -> Partial:
        """The same over the last keys, at these positions, as far as each row's window reaches."""
        keys, values = self._cached(cache, q)
        keys, values = (x[x.shape[0] - positions.shape[0] :] for x in (keys, values))
        if q.shape[0] == 1:
            return attend_stored(self.state.decode_kernel, q, keys, values, self.scale, False)
        assert self.window is not None
        return attend_at(q, keys, values, self.scale, first=rows.position, positions=positions, window=self.window)

    def _cached(self, cache: KVCache, q: Tensor) -> tuple[Tensor, Tensor]:
        """What a cache holds of this layer, k and v [tokens, b, ng, hn]."""
        cached = cache.get(self.layer_number)
        nothing = q.new_empty(0, q.shape[1], 1, q.shape[3])
        return (nothing, nothing) if cached is None else cached

    def _make_sinks(self, config: TransformerConfig) -> None:
        softmax = getattr(config, "softmax_type", None) or "vanilla"
        tp_size = config.tensor_model_parallel_size if self.groups is None else self.groups.tp.size()
        heads = config.num_attention_heads // tp_size
        if softmax == "learnable":
            sinks = nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
            self.register_parameter("softmax_offset", sinks)
        elif softmax == "off-by-one":
            self.register_buffer("softmax_offset", torch.zeros(heads), persistent=False)
        else:
            self.register_parameter("softmax_offset", None)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's dist_checkpointing: sinks, divided over tp as the heads are."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.groups.tp,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


def window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """Tokens that a token of this layer sees, itself among them; None: all. Megatron counts those before it."""
    sizes = getattr(config, "window_size", None)
    if not is_layer_window_attention(sizes, getattr(config, "window_attn_skip_freq", None), layer_number):
        return None
    return None if sizes is None else int(sizes[0]) + 1


def _filled(step: PrefillStep) -> list[Span]:
    return [span for span in step.block.widened if span[0] < span[1]]


def _joined(partials: list[Partial]) -> Partial:
    """Of sequences one after the other."""
    if len(partials) == 1:
        return partials[0]
    outs, lses = zip(*partials, strict=True)
    return torch.cat(outs), torch.cat(lses)
