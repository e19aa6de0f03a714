"""What a prefill computes, counted: multiply and add are two operations."""

from __future__ import annotations

from nemo_star.config.model import ModelConfig
from nemo_star.methods.method import Method


def prefill_flops(model: ModelConfig, method: Method, context_tokens: int, cp_size: int) -> int:
    """All ranks' operations in linear layers and attention; embedding, norms and rotary are left out."""
    counted = method.all_blocks(context_tokens, cp_size)
    in_flight = sum(count * method.tokens_in_flight(block) for block, count in counted)
    windowed = len(model.windowed_layers)
    pairs = (model.num_layers - windowed) * sum(count * method.pairs(block) for block, count in counted)
    if model.window_size is not None:
        pairs += windowed * method.all_windowed_pairs(context_tokens, cp_size, model.window_size)
    linear = 2 * in_flight * sum(model.layer_matrices.values())
    return model.num_layers * linear + model.pair_flops * pairs
