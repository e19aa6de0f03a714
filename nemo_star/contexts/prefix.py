"""Contexts that begin alike: what they have in common, and one that starts from another's K/V.

K/V of a context's first tokens do not depend on what comes after them, up to a token from which it can go on
(`Method.goes_on_from`): under star the end of a block, where block and anchor have the same sizes, because a block
depends on itself and the anchor alone (what it overlaps with, and what else may stand in the anchor's place, lies
before it, or follows from the first block); under exact methods every token; of a summary, which is chosen from the
whole context, none. Windowed layers keep the last tokens only, so in a model with such layers that is the one token
where the known context itself would go on.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence

from torch import Tensor

from nemo_star.attention.cache import KVCache
from nemo_star.engine.context import EncodedContext
from nemo_star.engine.encoding import TOKENS_AT_ONCE
from nemo_star.engine.engine import Engine
from nemo_star.methods.method import Method
from nemo_star.methods.partition import Block, Partition, clipped


def common_blocks(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Leading blocks that two texts have in common, by the digests of all tokens up to the end of each."""
    blocks = range(min(len(one), len(other)))
    return bisect_left(blocks, True, key=lambda number: one[number] != other[number])


def reusable(method: Method, common: int, known_tokens: int, *, has_windows: bool) -> int:
    """Tokens of a known context that another one can start from; 0: none.

    Args:
        common: tokens that both begin with, in whole blocks, or all tokens of the known one.
        has_windows: some layers of the model are windowed.
    """
    cut = method.goes_on_from(common)
    return 0 if has_windows and cut != method.goes_on_from(known_tokens) else cut


def pays(method: Method, cut: int, tokens: int, cp_size: int) -> bool:
    """Whether going on from `cut` takes less than encoding all. Where what goes on is not cut into blocks
    (`Method.going_on`), every cp rank computes all of it, which encoding would divide."""
    return cut > 0 and (method.has_blocks or (tokens - cut) * cp_size <= tokens)


def first_tokens(partition: Partition, tokens: int) -> Partition:
    """Who holds what of the first tokens."""
    ranks = []
    for blocks in partition.ranks:
        within = [dataclasses.replace(block, spans=clipped(block.spans, 0, tokens)) for block in blocks]
        ranks.append(tuple(block for block in within if block.spans))
    return Partition(tokens, tuple(ranks))


def gone_on(method: Method, partition: Partition, tokens: int) -> Partition:
    """Who holds what when a context has gone on to this length, as `Engine.extend` deals it out."""
    added = method.going_on(partition, tokens)
    if added is not None:
        return Partition(tokens, tuple((*old, *new) for old, new in zip(partition.ranks, added.ranks, strict=True)))
    ranks, held = [list(blocks) for blocks in partition.ranks], list(partition.tokens_by_rank)
    for start in range(partition.context_tokens, tokens, TOKENS_AT_ONCE):
        stop, owner = min(start + TOKENS_AT_ONCE, tokens), held.index(min(held))
        ranks[owner].append(Block(-1, ((start, stop),)))
        held[owner] += stop - start
    return Partition(tokens, tuple(map(tuple, ranks)))


def start_from(engine: Engine, known: EncodedContext, ids: Tensor, cut: int, *, copies: bool) -> EncodedContext:
    """A context of the first `cut` tokens of a known one, ready to go on to `ids`.

    Args:
        ids: [tokens] int32, of the whole text.
        copies: leave the known context as it is; else it becomes the new one, and sequences that hang on it end.
    """
    rank, method = engine.groups.cp.rank(), known.method
    partition = first_tokens(known.partition, cut)
    less = known.partition.tokens_of(rank) - partition.tokens_of(rank)
    if not copies:
        known.cache.drop(less)
        known.partition, known.ids = partition, ids[:cut]
        known.revision += 1
        return known
    room = gone_on(method, partition, len(ids)).tokens_of(rank)
    cache = KVCache(engine.state.cache_dtype, capacity=room)
    cache.reserve(engine.stage.full_layer_numbers, engine.stage.kv_shape)
    cache.extend(known.cache, less=less)
    return EncodedContext(ids[:cut], cache, partition, method)
