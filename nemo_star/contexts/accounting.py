"""Bytes of a context's K/V, known on all ranks alike: ranks hold different shares, and must decide the same."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_star.engine.engine import Engine
from nemo_star.methods.method import Method
from nemo_star.methods.partition import Partition, clipped, length
from nemo_star.parallel.groups import gather_objects


@dataclass(frozen=True)
class _Layers:
    """Of one pipeline stage."""

    full: int
    windowed: int
    window: int | None
    token_bytes: int
    """K and V of one token in one layer."""


class KVBytes:
    """Counts for one engine; all ranks of its replica make it together, and each counts alone."""

    def __init__(self, engine: Engine) -> None:
        stage = engine.stage
        shape = stage.kv_shape
        size = 2 * shape.batch * shape.groups * shape.channels * engine.state.cache_dtype.itemsize
        mine = _Layers(len(stage.full_layer_numbers), len(stage.windowed_layer_numbers), stage.window, size)
        self._stages = sorted(set(gather_objects(mine, engine.groups.replica)), key=repr)

    @property
    def has_windows(self) -> bool:
        """Whether some layers of the model keep the last tokens only."""
        return any(layers.window is not None for layers in self._stages)

    @property
    def token(self) -> int:
        """Of one token in all layers, on the rank that has most of them."""
        return max((layers.full + layers.windowed) * layers.token_bytes for layers in self._stages)

    def fullest(self, partition: Partition, method: Method) -> int:
        """Bytes on the rank that holds most of a context."""
        tokens = partition.context_tokens
        most = 0
        for layers in self._stages:
            first = method.windowed_from(tokens, layers.window)
            for rank, held in enumerate(partition.tokens_by_rank):
                near = length(clipped(partition.spans_of(rank), first, tokens)) if layers.windowed else 0
                most = max(most, (layers.full * held + layers.windowed * near) * layers.token_bytes)
        return most
