"""How many layers' anchors are alive at once, with broadcasts that never complete while the host runs on."""

import weakref

import pytest
import torch
import torch.distributed as dist

from nemo_star.attention.anchor import SharedAnchor
from nemo_star.attention.cache import KVShape
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.method import Heads, Share
from nemo_star.methods.star import Star

LAYERS, TOKENS = range(1, 9), 5
SHAPE = KVShape(1, 2, 4, torch.float32, torch.device("cpu"))
BYTES = 2 * TOKENS * 2 * 4 * 4
"""Of a layer: K and V of 5 tokens, 2 groups of 4 channels, float32."""


class Rank:
    """Of a cp group of two."""

    def __init__(self, rank):
        self.rank, self.size = (lambda: rank), (lambda: 2)


@pytest.fixture
def alive(monkeypatch):
    """Most bytes of broadcast tensors alive after any broadcast was asked for, and the layers in order."""
    tensors, most, waited = [], [0], []

    class Work:
        def __init__(self, tensor):
            self.tensor, self.number = tensor, len(tensors)

        def wait(self):
            waited.append(self.number)

        def is_completed(self):
            return False

    def broadcast(tensor, **_):
        tensors.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(kept().nbytes for kept in tensors if kept() is not None))
        return Work(tensor)

    monkeypatch.setattr(dist, "broadcast", broadcast)
    return most, waited


def planned(blocks_of_rank):
    star = Star(AttentionConfig(block_size=TOKENS))
    share = Share(context_tokens=2 * TOKENS, cp_size=2, num_blocks=blocks_of_rank, all_blocks=3)
    return star.kept_bytes(share, Heads(query=32, kv=8, groups=2), 4, layers=len(LAYERS))


def encode(anchor, first_block):
    for layer in LAYERS:
        if first_block:
            anchor.give(layer, *torch.zeros(2, TOKENS, 1, 2, 4))
        else:
            anchor.take(layer)


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_rank_of_the_first_block_keeps_what_is_planned(alive, blocks):
    most, waited = alive
    anchor = SharedAnchor(Rank(0), SHAPE, tokens=TOKENS, layer_numbers=LAYERS, blocks_left=blocks - 1)
    encode(anchor, first_block=True)
    assert most[0] == planned(blocks) == (2 if blocks == 1 else 8) * BYTES
    if blocks > 1:
        assert waited == []  # it keeps them all: nothing is won by waiting
        encode(anchor, first_block=False)
    anchor.finish()
    assert len(waited) == len(LAYERS)


def test_the_other_rank_keeps_what_is_planned(alive):
    most, waited = alive
    anchor = SharedAnchor(Rank(1), SHAPE, tokens=TOKENS, layer_numbers=LAYERS, blocks_left=1)
    encode(anchor, first_block=False)
    assert most[0] == planned(1)
    assert waited == sorted(waited)
