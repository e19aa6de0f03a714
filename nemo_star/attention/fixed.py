"""A decode step of fixed shape, which can be recorded once and repeated (engine/graphs.py).

It is one token of each sequence. All that changes from step to step is in tensors of the device; what a recorded step
reads and writes stays where it is: the context's K/V, and buffers for the K/V of the sequences' own tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_star.attention.cache import KVShape
from nemo_star.attention.step import DecodeStep
from nemo_star.kernels.padded import attend_padded
from nemo_star.kernels.stored import computed_type, is_fp8, saturated

Buffers = dict[int, tuple[Tensor, Tensor]]
"""K and V by Megatron's global, 1-based layer number."""


@dataclass(frozen=True)
class OwnKV:
    """K/V of the own tokens of several sequences, beside each other: [sequences, capacity + 1, ng, hn] a layer.

    The last slot takes what this rank does not cache: which rank does is known to the host alone, and a recorded step
    has to write somewhere.
    """

    capacity: int
    """Tokens of a sequence."""
    buffers: Buffers

    @classmethod
    def empty(cls, sequences: int, capacity: int, layer_numbers: Iterable[int], shape: KVShape) -> OwnKV:
        """Zeros: what is beyond a sequence's length is multiplied by a weight of 0, and must not be nan."""
        size = sequences, capacity + 1, shape.groups, shape.channels
        zeros = (torch.zeros(2, *size, dtype=shape.dtype, device=shape.device) for _ in layer_numbers)
        return cls(capacity, {number: (both[0], both[1]) for number, both in zip(layer_numbers, zeros, strict=True)})

    def of(self, row: int) -> Buffers:
        """Views [capacity, 1, ng, hn] of one sequence's, as a `KVCache` has them."""
        return {number: (k[row, :-1, None], v[row, :-1, None]) for number, (k, v) in self.buffers.items()}

    def slot(self, row: int, token: int | None) -> int:
        """Where the K/V of a sequence's own token go, counted over all sequences; None: it is not cached here."""
        return row * (self.capacity + 1) + (self.capacity if token is None else token)


@dataclass(frozen=True)
class FixedStep(DecodeStep):
    """`contexts` without sequences: these are in `own`, in the order of the rows."""

    own: OwnKV
    slots: Tensor
    """[rows] int64, where the K/V of each token go (`OwnKV.slot`)."""
    lengths: Tensor
    """[rows] int64: own tokens of each sequence on this rank, the new one among them where it is cached here."""
    reach: int
    """Slots that are looked at; no length is above it."""

    def attend_own(self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Cache k and v [rows, 1, ng, hn] of the new tokens, and attend to each sequence's own: out [rows, 1, np, hn],
        lse [rows, 1, np], float32; without any key out 0, lse -inf."""
        keys, values = self.own.buffers[layer_number]
        for buffer, new in ((keys, k), (values, v)):
            rounded = saturated(new[:, 0], buffer.dtype).to(buffer.dtype)
            as_stored = torch.uint8 if is_fp8(buffer.dtype) else buffer.dtype  # torch copies no fp8 by index
            buffer.view(as_stored).flatten(0, 1).index_copy_(0, self.slots, rounded.view(as_stored))
        seen = slice(0, self.reach)
        queries = q[:, 0].to(computed_type(keys.dtype, q.dtype))
        out, lse = attend_padded(queries, keys[:, seen], values[:, seen], scale, self.lengths)
        return out[:, None], lse[:, None]
