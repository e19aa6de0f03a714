"""This rank's K/V into a file, and out of the files of another layout."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_star.attention.cache import KVCache
from nemo_star.contexts.index import ContextIndex, Shard
from nemo_star.contexts.rows import Rows, common_rows, joined
from nemo_star.contexts.shard import open_tensors, write_tensors
from nemo_star.engine.context import EncodedContext
from nemo_star.engine.engine import Engine
from nemo_star.methods.partition import Partition, Span, clipped, length

Source = tuple[Shard, list[Rows]]
"""A file, and the rows that are wanted of it."""


def write_kv(engine: Engine, context: EncodedContext, data: Path) -> Shard:
    """Write what this rank holds of a context into a file of the folder `data`.

    Raises:
        ValueError: the context is not complete.
        OSError: the disk is full.
    """
    groups, stage = engine.groups, engine.stage
    cp_rank, pp_rank, tp_rank = (group.rank() for group in (groups.cp, groups.pp, groups.tp))
    spans = joined(context.partition.spans_of(cp_rank))
    if not context.tokens or context.cache.tokens != length(spans) or len(context.ids) != context.tokens:
        raise ValueError("it is still being encoded: all steps of its encoding come first")
    near = clipped(spans, context.method.windowed_from(context.tokens, stage.window), context.tokens)
    tensors: dict[str, Tensor] = {}
    for number in stage.layer_numbers:
        rows = length(near if number in stage.windowed_layer_numbers else spans)
        for name, held in zip("kv", _held(engine, context.cache, number), strict=True):
            assert held.shape[0] >= rows, f"layer {number} holds {held.shape[0]} tokens, not {rows}"
            tensors[f"{name}.{number}"] = held[held.shape[0] - rows :, 0]
    file, here = f"cp{cp_rank}-pp{pp_rank}-tp{tp_rank}.safetensors", stage.kv_shape.groups
    size, sha256 = write_tensors(data / file, tensors)
    return Shard(file, size, sha256, tuple(stage.layer_numbers), first_group=tp_rank * here, groups=here, spans=spans)


def _held(engine: Engine, cache: KVCache, layer_number: int) -> tuple[Tensor, Tensor]:
    """What the cache holds of a layer, k and v [tokens, 1, ng, hn]."""
    shape = engine.stage.kv_shape
    nothing = torch.empty(0, shape.batch, shape.groups, shape.channels, dtype=engine.state.cache_dtype)
    return cache.get(layer_number) or (nothing, nothing)


def read_kv(engine: Engine, data: Path, index: ContextIndex, partition: Partition) -> KVCache:
    """This rank's K/V of the tokens of `partition`, which begins what the index describes.

    Raises:
        ValueError: files are missing, damaged, or do not have all that is wanted.
    """
    stage = engine.stage
    spans = joined(partition.spans_of(engine.groups.cp.rank()))
    near = clipped(spans, index.windowed_from, partition.context_tokens)
    cache = KVCache(engine.state.cache_dtype, capacity=length(spans))
    cache.reserve(stage.full_layer_numbers, stage.kv_shape)
    full, windowed = _sources(engine, index, spans, 0), _sources(engine, index, near, index.windowed_from)
    with ExitStack() as exits:
        files = {shard.file: exits.enter_context(open_tensors(data / shard.file, shard.size)) for shard, _ in full}
        for number in stage.layer_numbers:
            is_windowed = number in stage.windowed_layer_numbers
            held, sources = (near, windowed) if is_windowed else (spans, full)
            of = length(spans) if is_windowed else None
            like = torch.empty(0, 1, stage.kv_shape.groups, stage.kv_shape.channels, device=stage.device)
            room = cache.room(number, length(held), like=like, of=of)
            having = [source for source in sources if number in source[0].layer_numbers]
            filled = sum(_fill(engine, number, room, source, files[source[0].file]) for source in having)
            if filled != length(held) * stage.kv_shape.groups:
                raise ValueError(f"saved context {data.parent}: its files do not have all tokens of layer {number}")
    return cache


def _sources(engine: Engine, index: ContextIndex, held: tuple[Span, ...], first: int) -> list[Source]:
    """Where the rows for the tokens `held` come from, in layers whose files have the tokens from `first` on."""
    found: list[Source] = []
    for shard in index.shards:
        mine, _ = _groups(engine, shard)
        if mine.start < mine.stop and not set(shard.layer_numbers).isdisjoint(engine.stage.layer_numbers):
            rows = list(common_rows(held, clipped(shard.spans, first, index.tokens)))
            if rows:
                found.append((shard, rows))
    return found


def _groups(engine: Engine, shard: Shard) -> tuple[slice, slice]:
    """The KV heads that this rank and the file have in common: as this rank counts them, and as the file does."""
    here = engine.stage.kv_shape.groups
    mine = engine.groups.tp.rank() * here
    first, last = max(mine, shard.first_group), min(mine + here, shard.first_group + shard.groups)
    return slice(first - mine, last - mine), slice(first - shard.first_group, last - shard.first_group)


def _fill(engine: Engine, layer_number: int, room: tuple[Tensor, Tensor], source: Source, file: Any) -> int:
    """Copy what a file has into `room`, k and v [tokens, 1, ng, hn]; tokens times heads that were copied."""
    shard, rows = source
    mine, theirs = _groups(engine, shard)
    for name, target in zip("kv", room, strict=True):
        content = file.get_slice(f"{name}.{layer_number}")
        for here, there, count in rows:
            target[here : here + count, 0, mine].copy_(content[there : there + count, theirs])
    return sum(count for *_, count in rows) * (mine.stop - mine.start)
