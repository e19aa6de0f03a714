import dataclasses

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
    return prefill_flops(MODEL, method_of(AttentionConfig(kind=kind, **settings)), tokens, cp_size) // 2


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


def test_star_without_an_anchor_and_of_one_block():
    assert flops("star", 10, block_size=4, anchor_size=0) == 10 * LINEAR + (10 + 10 + 3) * PAIR
    assert flops("star", 10, block_size=16) == flops("dense", 10, cp_size=1)
