"""What a forward pass is for: set by the engine before it, read by the layers in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from nemo_star.attention.cache import KVCache
from nemo_star.attention.preceding import PrecedingKV
from nemo_star.kernels.merge import Merge, merge_with_sinks
from nemo_star.kernels.registry import Kernel
from nemo_star.methods.method import Method
from nemo_star.methods.partition import Block, Partition

if TYPE_CHECKING:
    from nemo_star.attention.core import CoreAttention


class Handover(Protocol):
    """What a method hands from rank to rank, or from block to block, during one prefill."""

    waited_seconds: float
    """Spent on waiting for other ranks (CPU; a GPU waits in its own queue)."""

    def finish(self) -> None:
        """After the last round: free everything."""


@dataclass(frozen=True)
class PrefillStep:
    """One block of a context is encoded: tokens `method.in_flight(block)`, one sequence."""

    block: Block
    partition: Partition
    cache: KVCache
    """Of the context: the block's own K/V go here."""
    handover: Handover | None = None
    tokens_by_rank: tuple[int, ...] = ()
    """In flight on each cp rank at the same time."""
    number: int = 0
    """Of the round: ranks go through their blocks in step."""
    preceding: PrecedingKV | None = None
    """What windowed layers see before the block; None where the stage has no such layers."""


@dataclass(frozen=True)
class Near:
    """Positions [keys] int64, ascending, of the last keys of a cache: those within the window of a step's first token.
    Later tokens of the step see no further back. Of a step of one token only their number is read: they stay on CPU."""

    context: torch.Tensor
    own: torch.Tensor


@dataclass(frozen=True)
class SequenceRows:
    """Tokens of one sequence in a decode step: rows [start, stop) of the step's tokens."""

    start: int
    stop: int
    own: KVCache
    """K/V of the sequence's own tokens on this rank."""
    caches_own: bool
    """The K/V of these rows are cached here: on exactly one rank of the cp group."""
    position: int
    """Of the first of these tokens."""
    near: Near | None = None
    """What windowed layers see; None where the stage has no such layers."""


@dataclass(frozen=True)
class ContextRows:
    """Sequences that hang on the same context: rows [start, stop) of the step's tokens, which read its K/V together."""

    start: int
    stop: int
    context: KVCache
    """K/V of the context on this rank; only read."""
    sequences: tuple[SequenceRows, ...]


@dataclass(frozen=True)
class DecodeStep:
    """Query or generated tokens of several sequences, one after the other along the token dimension."""

    contexts: tuple[ContextRows, ...]


class Observer(Protocol):
    """Looks on while layers attend, and changes nothing: a measurement (evaluation/fidelity/mass.py)."""

    def prefilled(self, layer: CoreAttention, q: torch.Tensor, k: torch.Tensor) -> None:
        """A block attended: q [sq, b, np, hn] to k [sk, b, ng, hn], causally, aligned to the bottom right."""
        ...

    def decoded(self, layer: CoreAttention, q: torch.Tensor, lse: torch.Tensor, step: DecodeStep) -> None:
        """Tokens attended to all keys of all cp ranks: q [sq, b, np, hn], lse [sq, b, np] over them, float32."""
        ...


@dataclass
class AttentionState:
    """What the layers of one model share, and the engine steers.

    It reaches the layers through their constructor (`functools.partial` in the layer spec), not through the
    TransformerConfig, which Megatron may copy.
    """

    method: Method
    """How contexts are encoded."""
    cp_group: dist.ProcessGroup
    kernel: Kernel
    """Computes in the model's type: prefill."""
    decode_kernel: Kernel
    """Computes in the cache's type; where that is fp8, in the model's."""
    cache_dtype: torch.dtype
    """Of cached K/V."""
    merge: Merge = merge_with_sinks
    """Merges decode's partial results."""
    decode_group: dist.ProcessGroup | None = None
    """tp x cp, whose ranks share the work of a token (models/decode_sharding.py); None: each cp rank does all of it."""
    completes_prefill: bool = False
    """Whether prefill runs the last layer's attention and MLP, whose results nobody reads but a dump."""
    observer: Observer | None = None
    """Told of what layers attend to."""
    step: PrefillStep | DecodeStep | None = None
    query_scale: torch.Tensor | None = None
    """What the step's rotated queries are multiplied by, broadcast to [s, b, np, hn]; None: nothing."""
    windowed_query_scale: torch.Tensor | None = None
    """The same in windowed layers."""
