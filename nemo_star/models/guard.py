"""What Megatron keeps inside the core attention that ours replaces: refused by name where a configuration asks for it.

Megatron's `DotProductAttention` and Transformer Engine's (`megatron/core/transformer/dot_product_attention.py`,
`extensions/transformer_engine.py`) read these fields of the TransformerConfig; our `CoreAttention` does not, and a
model would come out wrong without a word. Fields that a release of Megatron does not have are skipped.
"""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

ACCEPTED: dict[str, tuple[object, ...]] = {
    "softmax_type": ("vanilla", "learnable", "off-by-one", None),
    "attention_dropout": (0.0,),
    "attn_logit_softcapping": (None, 0.0),
    "apply_query_key_layer_scaling": (False, None),
    "qk_clip": (False, None),
    "multi_latent_attention": (False, None),
    "experimental_attention_variant": (None,),
    "fp8_dot_product_attention": (False, None),
    "fp8_multi_head_attention": (False, None),
}
"""Field -> values with which core attention is softmax(q k * scale) v, with or without sinks, as ours computes it."""


def check_core_attention(config: TransformerConfig) -> None:
    """Refuse a configuration that asks core attention for more than ours does.

    Raises:
        ValueError: names the fields, their values and what is accepted.
    """
    window = getattr(config, "window_size", None)
    if window and (window[0] < 0 or window[1] != 0):
        raise ValueError(
            f"TransformerConfig: window_size={window!r} is not supported: a window is (tokens before a token's own, 0)"
        )
    wrong = [
        f"{name}={getattr(config, name)!r} (only {ACCEPTED[name][0]!r} is supported)"
        for name in ACCEPTED
        if hasattr(config, name) and getattr(config, name) not in ACCEPTED[name]
    ]
    if wrong:
        raise ValueError(
            f"TransformerConfig: {', '.join(wrong)}: Megatron keeps this inside its core attention, which nemo_star "
            "replaces and which would drop it silently"
        )


def uses_windows(config: TransformerConfig) -> bool:
    """Whether a configuration asks for windowed layers or sinks."""
    return bool(getattr(config, "window_size", None)) or getattr(config, "softmax_type", None) not in ("vanilla", None)
