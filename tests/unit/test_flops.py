import dataclasses
import itertools

import pytest

from nemo_star.config.model import ModelConfig
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.registry import method_of
from nemo_star.planning.flops import prefill_flops

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=16,
    kv_channels=2,
    vocab_size=10,
    max_position_embeddings=100,
)
LINEAR = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
"""Operations of one token in one layer's matrices."""
PAIR = 4 * 4 * 2
"""Operations of one (query, key) pair in one layer."""


def flops(kind, tokens, cp_size=2, **settings):
    method = method_of(AttentionConfig(kind=kind, **settings))
    return prefill_flops(MODEL, method, tokens, cp_size, complete=True) // 2


def test_heads_may_have_a_dimension_of_their_own():
    wide = dataclasses.replace(MODEL, kv_channels=6)
    assert (wide.query_width, wide.kv_width, wide.pair_flops) == (24, 12, 96)
    assert wide.layer_matrices == {"qkv": 8 * (24 + 2 * 12), "projection": 24 * 8, "ffn": 3 * 8 * 16}
    assert dataclasses.replace(MODEL, kv_channels=0) == MODEL
    with pytest.raises(ValueError, match="hidden_size 9 is not divisible by num_attention_heads 4: give kv_channels"):
        dataclasses.replace(MODEL, hidden_size=9, kv_channels=0)


def test_exact_kinds_count_every_pair_once():
    every = 20 * LINEAR + 20 * 21 // 2 * PAIR
    assert flops("dense", 20, cp_size=1) == flops("ring", 20) == flops("ulysses", 20) == flops("ring", 20, 3) == every


@pytest.mark.parametrize(("anchor", "extra"), [("shared", 0), ("recompute", 2)])
def test_star_counts_blocks_anchors_and_what_is_computed_again(anchor, extra):
    # 3 blocks of 4, 4 and 2 tokens, anchor 3
    pairs = 10 + (10 + 4 * 3) + (3 + 2 * 3) + extra * 6
    assert flops("star", 10, block_size=4, anchor_size=3, anchor=anchor) == (10 + extra * 3) * LINEAR + pairs * PAIR


@pytest.mark.parametrize("window", [1, 3, 5, 30])
@pytest.mark.parametrize(("kind", "cp"), [("dense", 1), ("ring", 2), ("ulysses", 2), ("star", 3)])
def test_windowed_layers_count_the_pairs_within_the_window(window, kind, cp):
    model = dataclasses.replace(MODEL, window_size=window, windowed_layers=(1,))
    method = method_of(AttentionConfig(kind=kind, block_size=4), windows=True)
    near = sum(min(token + 1, window) for token in range(22))
    alone = dataclasses.replace(MODEL, num_layers=1)
    full = prefill_flops(alone, method, 22, cp, complete=True)
    assert prefill_flops(model, method, 22, cp, complete=True) == full + 22 * LINEAR + near * PAIR
    if kind == "star":
        again = method_of(AttentionConfig(block_size=4, anchor_size=3, anchor="recompute"), windows=True)
        full = prefill_flops(alone, again, 22, cp, complete=True)
        near += 5 * sum(min(token + 1, window) for token in range(3))
        assert prefill_flops(model, again, 22, cp, complete=True) == full + (22 + 5 * 3) * LINEAR + near * PAIR


def test_the_last_layer_makes_keys_and_values_only():
    for windowed in ((), (0,), (1,)):
        model = dataclasses.replace(MODEL, window_size=3 if windowed else None, windowed_layers=windowed)
        method = method_of(AttentionConfig(block_size=4), windows=True)
        near = sum(min(token + 1, 3) for token in range(22))
        every = sum(count * method.pairs(block) for block, count in method.all_blocks(22, 1))
        left_out = near if windowed == (1,) else every
        whole = prefill_flops(model, method, 22, 1, complete=True)
        assert whole - prefill_flops(model, method, 22, 1) == 22 * 2 * 3 * 8 * 16 + left_out * PAIR


def test_the_ablation_counts_what_the_published_anchor_does():
    sizes = {"block_size": 4, "anchor_size": 3, "anchor": "recompute"}
    for content in ("previous", "random"):
        ablated = {"anchor_content": content, "anchor_positions": "previous"}
        assert flops("star", 10, **sizes, **ablated) == flops("star", 10, **sizes)


def test_an_overlap_counts_again():
    # 4 blocks of 10, 10, 10 and 5 tokens; an anchor of 8; before block 1 the 2 tokens that are no anchor, then 6
    sizes = {"block_size": 10, "anchor_size": 8, "overlap_size": 6}
    own = (10, 12, 16, 11)
    pairs = sum(tokens * (tokens + 1) // 2 for tokens in own) + 8 * sum(own[1:])
    for cp_size in (1, 2, 5):
        assert flops("star", 35, cp_size, **sizes) == sum(own) * LINEAR + pairs * PAIR
        recomputed = pairs + 3 * 8 * 9 // 2
        assert flops("star", 35, cp_size, anchor="recompute", **sizes) == (sum(own) + 24) * LINEAR + recomputed * PAIR


def test_blocks_alike_are_counted_as_they_are_dealt_out():
    for overlap, tokens, cp_size in itertools.product((0, 1, 4, 10), (5, 10, 11, 35, 97), (1, 2, 3, 5)):
        method = method_of(AttentionConfig(block_size=10, anchor_size=8, overlap_size=overlap))
        for rank, blocks in enumerate(method.partition(tokens, cp_size).ranks):
            counted = method.rank_blocks(tokens, cp_size, rank)
            assert sum(count for _, count in counted) == len(blocks)
            assert sum(count * method.pairs(block) for block, count in counted) == sum(map(method.pairs, blocks))


def test_windowed_layers_of_blocks_that_overlap():
    for overlap, anchor, tokens, window in itertools.product(
        (0, 1, 4, 10), (0, 8, 10), (5, 10, 35, 97), (1, 3, 12, 60)
    ):
        method = method_of(AttentionConfig(block_size=10, anchor_size=anchor, overlap_size=overlap), windows=True)
        blocks = [block for of_rank in method.partition(tokens, 2).ranks for block in of_rank]
        every = sum(method.windowed_pairs(block, window) for block in blocks)
        assert method.all_windowed_pairs(tokens, 2, window) == every
        near = sum(min(place + 1, window) for block in blocks for span in block.widened for place in range(*span))
        assert every == near


def test_a_summary_counts_what_each_block_sees():
    # 4 blocks of 10, 10, 10 and 5 tokens; a sink of 2 and two chunks of 3, from blocks 0 and 1
    triangles = 3 * 55 + 15 + 8 * 9 // 2
    pairs = triangles + 10 * (2 + 3) + 10 * (2 + 6) + 5 * (2 + 6)
    sizes = {"block_size": 10, "anchor_size": 9, "sink_size": 2, "chunk_size": 3}
    for cp_size in (1, 2, 5):
        assert flops("summary", 35, cp_size, **sizes) == (35 + 8) * LINEAR + pairs * PAIR
    assert flops("summary", 35, block_size=40) == flops("dense", 35, cp_size=1)


def test_star_without_an_anchor_and_of_one_block():
    assert flops("star", 10, block_size=4, anchor_size=0) == 10 * LINEAR + (10 + 10 + 3) * PAIR
    assert flops("star", 10, block_size=16) == flops("dense", 10, cp_size=1)
