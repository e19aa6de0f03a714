"""What prefill computes and decode reads, counted: multiply and add are two operations."""

from __future__ import annotations

from nemo_star.config import AttentionConfig
from nemo_star.distributed import Layout
from nemo_star.model import ModelConfig
from nemo_star.partition import Block, Partition


def prefill_flops(model: ModelConfig, partition: Partition, attention: AttentionConfig) -> int:
    """All ranks' operations in linear layers and attention; embedding, norms and rotary are left out."""
    query, kv = (heads * model.kv_channels for heads in (model.num_attention_heads, model.num_query_groups))
    weights = model.hidden_size * (2 * query + 2 * kv + 3 * model.ffn_hidden_size)
    total = 0
    for block in (block for blocks in partition.ranks for block in blocks):
        recomputed = block.anchor_size if attention.anchor == "recompute" else 0
        pairs = _local_pairs(block, recomputed) if attention.kind == "star" else _global_pairs(block)
        total += 2 * (recomputed + block.tokens) * weights + 4 * query * pairs
    return total * model.num_layers


def decode_weight_bytes(model: ModelConfig, layout: Layout, *, sharded: bool, itemsize: int) -> int:
    """Bytes of weights that one rank reads for one token, without the head (stages taken as equal).

    Args:
        sharded: the FFN divided over cp, too (the output projection where tp > 1, as `decode_sharding` does).
    """
    query, kv = (heads * model.kv_channels for heads in (model.num_attention_heads, model.num_query_groups))
    whole, divided = query + 2 * kv, 3 * model.ffn_hidden_size
    if layout.tp > 1:
        divided += query
    else:
        whole += query
    rows = whole + divided / (layout.cp if sharded else 1)
    return int(rows * model.hidden_size * itemsize * model.num_layers / (layout.tp * layout.pp))


def _local_pairs(block: Block, recomputed: int) -> int:
    """(query, key) pairs of a star block: causal in itself, all of the anchor, causal in a recomputed anchor."""
    return _triangle(block.tokens) + block.tokens * block.anchor_size + _triangle(recomputed)


def _global_pairs(block: Block) -> int:
    """(query, key) pairs of pieces that attend to the whole context before them."""
    return sum(_triangle(stop) - _triangle(start) for start, stop in block.pieces)


def _triangle(tokens: int) -> int:
    return tokens * (tokens + 1) // 2
