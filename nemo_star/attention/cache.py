"""Keys and values on this rank, layer by layer.

A layer's K and V lie in one buffer each, seen as [capacity, b, ng, hn], so that appending is one copy and reading is a
view. On CPU the tokens of a group lie one behind the other, which is the order in which decode attention reads them.
Layers are keyed by Megatron's global, 1-based `layer_number`; a pipeline stage holds only its own. K is stored after
rotary embedding, so a cached key never depends on where it lies in the buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_star.kernels.stored import saturated


@dataclass(frozen=True)
class KVShape:
    """What the K (or V) of one layer looks like on this rank: [tokens, b, ng, hn]."""

    batch: int
    groups: int
    channels: int
    dtype: torch.dtype
    device: torch.device


@dataclass
class _Layer:
    k: Tensor
    v: Tensor
    tokens: int = 0
    given: int = 0
    """Tokens that were appended, or left out because nobody will look at them."""


class KVCache:
    """Append-only K/V of one context, or of one sequence's own tokens, with a roll back to an earlier length.

    Args:
        dtype: stored type; None keeps the type of the first K appended.
        capacity: tokens to allocate for, by `reserve` or when a layer is first appended to; past it buffers are copied.
    """

    def __init__(self, dtype: torch.dtype | None = None, *, capacity: int = 0) -> None:
        self.dtype = dtype
        self._capacity = capacity
        self._layers: dict[int, _Layer] = {}

    @property
    def tokens(self) -> int:
        """Tokens cached (between steps all layers have come as far; windowed ones hold the last of them only)."""
        return max((layer.given for layer in self._layers.values()), default=0)

    @property
    def capacity(self) -> int:
        """Tokens that were planned for."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that all layers hold."""
        return sum(layer.tokens * 2 * layer.k[0].nbytes for layer in self._layers.values() if layer.tokens)

    def reserve(self, layer_numbers: Iterable[int], shape: KVShape) -> None:
        """Allocate these layers now. Taken one by one during prefill, they would come to lie between buffers that are
        freed soon, and keep an allocator from giving their memory back."""
        like = torch.empty(0, shape.batch, shape.groups, shape.channels, dtype=shape.dtype, device=shape.device)
        for number in layer_numbers:
            if number not in self._layers:
                self._layers[number] = self._grown(None, like, 0, self._capacity)

    def append(self, layer_number: int, k: Tensor, v: Tensor, *, of: int | None = None) -> None:
        """Copy k, v [tokens, b, ng, hn] behind what the layer holds; the last ones of `of` tokens, where a windowed
        layer leaves out what nobody will look at. What the stored type has no value for becomes its largest."""
        room_k, room_v = self.room(layer_number, k.shape[0], like=k, of=of)
        room_k.copy_(saturated(k, room_k.dtype))
        room_v.copy_(saturated(v, room_v.dtype))

    def room(self, layer_number: int, tokens: int, *, like: Tensor, of: int | None = None) -> tuple[Tensor, Tensor]:
        """Views (k, v), each [tokens, b, ng, hn], of room for further tokens behind what the layer holds, to be filled
        by the caller; `of` as in `append`.

        Args:
            like: a tensor [any, b, ng, hn] on the cache's device.
        """
        layer = self._layers.get(layer_number)
        start = layer.tokens if layer else 0
        stop = start + tokens
        if layer is None or stop > layer.k.shape[0]:
            # Past the plan it grows by an eighth, so that appending stays cheap.
            capacity = max(stop, self._capacity if of is None else 0) if start == 0 else stop + stop // 8
            layer = self._layers[layer_number] = self._grown(layer, like, start, capacity)
        layer.tokens = stop
        layer.given += tokens if of is None else of
        return layer.k[start:stop], layer.v[start:stop]

    def get(self, layer_number: int) -> tuple[Tensor, Tensor] | None:
        """Views (k, v), each [tokens, b, ng, hn], of what the layer holds; None where it holds nothing."""
        layer = self._layers.get(layer_number)
        if layer is None or layer.tokens == 0:
            return None
        return layer.k[: layer.tokens], layer.v[: layer.tokens]

    def move(self, buffers: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Hold the same in other buffers from now on: k and v of these layers, each [capacity, b, ng, hn]."""
        for number, (k, v) in buffers.items():
            layer = self._layers.get(number, _Layer(k, v))
            k[: layer.tokens].copy_(layer.k[: layer.tokens])
            v[: layer.tokens].copy_(layer.v[: layer.tokens])
            self._layers[number] = _Layer(k, v, layer.tokens, layer.given)

    def count(self, tokens: int) -> None:
        """So many more have been written behind what all layers hold, by whoever has the buffers."""
        for layer in self._layers.values():
            layer.tokens += tokens
            layer.given += tokens

    def truncate(self, tokens: int) -> None:
        """Roll back to the first `tokens` tokens of every layer."""
        self.drop(max(0, self.tokens - tokens))

    def drop(self, tokens: int) -> None:
        """Take the last `tokens` tokens away from every layer."""
        for layer in self._layers.values():
            layer.tokens -= min(tokens, layer.tokens)
            layer.given -= min(tokens, layer.given)

    def keep_last(self, layer_numbers: Iterable[int], tokens: int) -> None:
        """Forget all but the last `tokens` tokens of these layers, which nobody will look at."""
        for number in layer_numbers:
            layer = self._layers.get(number)
            if layer is not None and layer.tokens > tokens:
                first = layer.tokens - tokens
                kept = _Layer(self._buffer(layer.k, tokens), self._buffer(layer.v, tokens), tokens, layer.given)
                kept.k.copy_(layer.k[first : layer.tokens])
                kept.v.copy_(layer.v[first : layer.tokens])
                self._layers[number] = kept

    def extend(self, other: KVCache, *, less: int = 0) -> None:
        """Append what another cache of the same layers holds, but for its last `less` tokens."""
        for number, layer in other._layers.items():
            kept, given = layer.tokens - min(less, layer.tokens), layer.given - min(less, layer.given)
            if given:
                self.append(number, layer.k[:kept], layer.v[:kept], of=given)

    def copy(self) -> KVCache:
        """The same tokens in buffers of their own."""
        copied = KVCache(self.dtype)
        for number, layer in self._layers.items():
            copied._layers[number] = self._grown(layer, layer.k, layer.tokens, layer.tokens)
        return copied

    def _grown(self, layer: _Layer | None, like: Tensor, kept: int, capacity: int) -> _Layer:
        given = layer.given if layer is not None else 0
        grown = _Layer(self._buffer(like, capacity), self._buffer(like, capacity), kept, given)
        if layer is not None and kept:
            grown.k[:kept].copy_(layer.k[:kept])
            grown.v[:kept].copy_(layer.v[:kept])
        return grown

    def _buffer(self, like: Tensor, capacity: int) -> Tensor:
        _, b, ng, hn = like.shape
        dtype = self.dtype or like.dtype
        if like.device.type == "cpu":
            return like.new_empty((b, ng, capacity, hn), dtype=dtype).permute(2, 0, 1, 3)
        return like.new_empty((capacity, b, ng, hn), dtype=dtype)
