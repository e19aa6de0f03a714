"""What a prefill computes, counted: multiply and add are two operations."""

from __future__ import annotations

from nemo_star.config.model import ModelConfig
from nemo_star.methods.method import Method
from nemo_star.methods.partition import Block


def prefill_flops(model: ModelConfig, method: Method, context_tokens: int, cp_size: int) -> int:
    """All ranks' operations in linear layers and attention; embedding, norms and rotary are left out."""
    counted = method.all_blocks(context_tokens, cp_size)
    return model.num_layers * sum(count * block_flops(model, block, method) for block, count in counted)


def block_flops(model: ModelConfig, block: Block, method: Method) -> int:
    """Operations of one layer for one block."""
    linear = 2 * method.tokens_in_flight(block) * sum(model.layer_matrices.values())
    return linear + model.pair_flops * method.pairs(block)
