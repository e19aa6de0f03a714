"""What a prefill computes, counted: multiply and add are two operations."""

from __future__ import annotations

from collections import Counter

from nemo_star.config.model import ModelConfig
from nemo_star.methods.method import Method


def prefill_flops(
    model: ModelConfig, method: Method, context_tokens: int, cp_size: int, *, complete: bool = False
) -> int:
    """All ranks' operations in linear layers and attention; embedding, norms and rotary are left out.

    Args:
        complete: the last layer's attention and FFN are run, too, though nobody reads what they give.
    """
    counted = method.all_blocks(context_tokens, cp_size)
    in_flight = sum(count * method.tokens_in_flight(block) for block, count in counted)
    attending = Counter(map(model.window_of, range(model.num_layers - (not complete))))
    pairs = attending[None] * sum(count * method.pairs(block) for block, count in counted)
    if model.window_size is not None:
        windowed = method.all_windowed_pairs(context_tokens, cp_size, model.window_size)
        pairs += attending[model.window_size] * windowed
    matrices = model.layer_matrices
    elements = model.num_layers * sum(matrices.values()) - (0 if complete else matrices["ffn"])
    return 2 * in_flight * elements + model.pair_flops * pairs
