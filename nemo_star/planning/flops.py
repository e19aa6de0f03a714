"""What a prefill computes, counted: multiply and add are two operations."""

from __future__ import annotations

from nemo_star.config.model import ModelConfig
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.partition import Block, Partition


def prefill_flops(model: ModelConfig, partition: Partition, attention: AttentionConfig) -> int:
    """All ranks' operations in linear layers and attention; embedding, norms and rotary are left out."""
    blocks = (block for blocks in partition.ranks for block in blocks)
    return model.num_layers * sum(block_flops(model, block, attention) for block in blocks)


def block_flops(model: ModelConfig, block: Block, attention: AttentionConfig) -> int:
    """Operations of one layer for one block."""
    linear = 2 * tokens_in_flight(block, attention) * sum(model.layer_matrices.values())
    return linear + model.pair_flops * attention_pairs(block, attention)


def tokens_in_flight(block: Block, attention: AttentionConfig) -> int:
    """Tokens that run through the layers for a block: its own, and a recomputed anchor's."""
    return block.tokens + _recomputed(block, attention)


def attention_pairs(block: Block, attention: AttentionConfig) -> int:
    """(query, key) pairs of one layer for one block.

    A star block: causal in itself, all of the anchor, causal in a recomputed anchor. Other kinds' pieces attend to the
    whole context before them.
    """
    if attention.kind != "star":
        return sum(_triangle(stop) - _triangle(start) for start, stop in block.pieces)
    recomputed = _triangle(_recomputed(block, attention))
    return _triangle(block.tokens) + block.tokens * block.anchor_size + recomputed


def _recomputed(block: Block, attention: AttentionConfig) -> int:
    return block.anchor_size if attention.kind == "star" and attention.anchor == "recompute" else 0


def _triangle(tokens: int) -> int:
    return tokens * (tokens + 1) // 2
