"""Encoded contexts on disk: saved by the ranks that hold them, loaded at any tp, cp and pp.

Each rank writes its own K/V; the index takes its name when all of them are on disk, so a save that is killed leaves
what was there before. A rank that loads takes the rows and heads that it holds in the new layout from whatever files
have them. The folder must be one that all machines of the job share. K and V are neither computed again nor rounded:
another `cache.dtype` is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nemo_star.contexts.files import read_kv, write_kv
from nemo_star.contexts.index import (
    FORMAT_VERSION,
    TOKENS_FILE,
    ContextIndex,
    Shard,
    discard,
    new_data,
    read_index,
    write_index,
)
from nemo_star.contexts.shard import Written, checksum, open_tensors, write_tensors
from nemo_star.engine.context import EncodedContext
from nemo_star.engine.engine import Engine
from nemo_star.kernels.stored import stored_name
from nemo_star.methods.partition import Partition
from nemo_star.methods.registry import method_of
from nemo_star.models.guard import uses_windows
from nemo_star.parallel.groups import gather_objects, on_every_rank, on_first_rank

T = TypeVar("T")


def save_context(engine: Engine, context: EncodedContext, folder: Path, *, fingerprint: str) -> None:
    """Save a context in a folder of its own, in place of one that was saved there; all ranks of all replicas call it
    with the same context, and the first replica writes.

    Args:
        folder: made where it does not exist; on all machines the same one.
        fingerprint: of the weights (`weights_fingerprint`).

    Raises:
        ValueError: on all ranks alike: the folder holds something else, or cannot be written.
    """
    if engine.groups.dp.size() == 1:
        save_on_replica(engine, context, folder, fingerprint=fingerprint)
        return
    writes = engine.groups.dp.rank() == 0
    on_every_rank(lambda: save_on_replica(engine, context, folder, fingerprint=fingerprint) if writes else None)


def save_on_replica(engine: Engine, context: EncodedContext, folder: Path, *, fingerprint: str) -> None:
    """`save_context` by one replica, whose ranks alone call it; replicas take folders that differ."""
    group = engine.groups.replica
    data = on_first_rank(lambda: _named(folder, lambda: new_data(folder)), group)
    try:
        shard, tokens = on_every_rank(lambda: _named(folder, lambda: _write(engine, context, folder / data)), group)
        shards, tokens = gather_objects(shard, group), gather_objects(tokens, group)[0]
        index = _index(engine, context, shards, tokens, fingerprint=fingerprint, data=data)
        on_first_rank(lambda: _named(folder, lambda: write_index(folder, index)), group)
    except Exception:
        if group.rank() == 0:
            discard(folder, data)
        raise


def load_context(
    engine: Engine,
    folder: Path,
    *,
    fingerprint: str,
    verify: bool = False,
    partition: Partition | None = None,
) -> EncodedContext:
    """A saved context on the ranks of a replica, which all call it; dealt out as its method does with that length.

    It keeps the method it was encoded with, whatever the engine's is; sequences hang on it as on any other.

    Args:
        fingerprint: of the engine's weights.
        verify: compare checksums, too, not only sizes: all files are read once more.
        partition: for its first tokens only, up to where it can go on: who holds what of them.

    Raises:
        ValueError: on all ranks alike: nothing is saved there, files are missing, truncated or damaged, or it belongs
            to other weights, another shape or another cache.dtype.
    """
    group = engine.groups.replica
    index = on_first_rank(lambda: _checked(engine, folder, fingerprint), group)
    settings = dataclasses.replace(index.attention, kernel=engine.method.settings.kernel)

    def read() -> EncodedContext:
        method = method_of(settings, windows=uses_windows(engine.stage.model.config))
        if verify:
            _verify(folder, index, group.rank(), group.size())
        dealt = method.partition(index.tokens, engine.groups.cp.size()) if partition is None else partition
        with open_tensors(folder / index.data / TOKENS_FILE, index.tokens_size) as file:
            ids = file.get_slice("ids")[: dealt.context_tokens].clone()
        return EncodedContext(ids, read_kv(engine, folder / index.data, index, dealt), dealt, method)

    return on_every_rank(read, group)


def _write(engine: Engine, context: EncodedContext, data: Path) -> tuple[Shard, Written]:
    """This rank's K/V, and on the first rank the tokens."""
    shard, tokens = write_kv(engine, context, data), Written(0, "")
    if engine.groups.replica.rank() == 0:
        tokens = write_tensors(data / TOKENS_FILE, {"ids": context.ids})
    return shard, tokens


def _index(
    engine: Engine, context: EncodedContext, shards: list[Shard], tokens: Written, *, fingerprint: str, data: str
) -> ContextIndex:
    """The same on all ranks of the replica."""
    config, group, stage = engine.stage.model.config, engine.groups.replica, engine.stage
    windowed = gather_objects((stage.window, stage.windowed_layer_numbers), group)
    window = max((size for size, _ in windowed if size is not None), default=None)
    return ContextIndex(
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint,
        attention=context.method.settings,
        dtype=stored_name(engine.state.cache_dtype),
        num_layers=config.num_layers,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        windowed_layers=tuple(sorted({number for _, numbers in windowed for number in numbers})),
        windowed_from=context.method.windowed_from(context.tokens, window),
        tokens=context.tokens,
        data=data,
        tokens_size=tokens.size,
        tokens_sha256=tokens.sha256,
        shards=tuple(shards),
    )


def _checked(engine: Engine, folder: Path, fingerprint: str) -> ContextIndex:
    """The index, if it belongs to these weights and all files have their sizes."""
    index = read_index(folder)
    if index.fingerprint != fingerprint:
        raise ValueError(
            f"saved context {folder} belongs to other weights (fingerprint {index.fingerprint[:12]}..., this model's "
            f"is {fingerprint[:12]}...): encode it again with this model"
        )
    config, dtype = engine.stage.model.config, stored_name(engine.state.cache_dtype)
    for name in ("num_layers", "num_query_groups", "kv_channels"):
        saved, here = getattr(index, name), getattr(config, name)
        if saved != here:
            raise ValueError(f"saved context {folder} is of a model with {name} {saved}, this one has {here}")
    if index.dtype != dtype:
        raise ValueError(
            f"saved context {folder} has K/V in {index.dtype}, this engine caches {dtype}: "
            f"set cache.dtype={index.dtype}, or encode it again"
        )
    for file, size in ((TOKENS_FILE, index.tokens_size), *((shard.file, shard.size) for shard in index.shards)):
        with open_tensors(folder / index.data / file, size):
            pass
    return index


def _verify(folder: Path, index: ContextIndex, rank: int, ranks: int) -> None:
    """Compare checksums; the ranks divide the files."""
    files = [(TOKENS_FILE, index.tokens_sha256), *((shard.file, shard.sha256) for shard in index.shards)]
    for name, expected in files[rank::ranks]:
        found = checksum(folder / index.data / name)
        if found != expected:
            raise ValueError(
                f"{folder / index.data / name} has sha256 {found[:12]}..., should have {expected[:12]}...: "
                "the saved context is damaged"
            )


def _named(folder: Path, make: Callable[[], T]) -> T:
    """The disk's errors in a user's words."""
    try:
        return make()
    except (OSError, ValueError) as error:
        raise ValueError(f"the context cannot be saved in {folder}: {error}") from error
