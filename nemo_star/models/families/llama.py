"""Llama 2, 3, 3.1, 3.2: Hugging Face names and configuration <-> Megatron's dist_checkpoint keys.

The keys are those of Megatron's GPTModel with Transformer Engine's names for the fused norms, layers stacked in a first
dimension; Megatron's local spec maps its own names to them, so one checkpoint loads in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_star.config.model import ModelConfig
from nemo_star.config.strict import parse
from nemo_star.models.families.weights import Weight, join_gate_up, join_qkv, split_gate_up, split_qkv

ARCHITECTURE = "LlamaForCausalLM"


_LAYER = "model.layers.{layer}."
_WEIGHTS = (
    Weight(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        lambda m: ((m.vocab_size, m.hidden_size),),
    ),
    Weight(
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        (_LAYER + "input_layernorm.weight",),
        lambda m: ((m.hidden_size,),),
    ),
    Weight(
        "decoder.layers.self_attention.linear_qkv.weight",
        tuple(f"{_LAYER}self_attn.{part}_proj.weight" for part in "qkv"),
        lambda m: (
            (m.query_width, m.hidden_size),
            (m.kv_width, m.hidden_size),
            (m.kv_width, m.hidden_size),
        ),
        join_qkv,
        split_qkv,
    ),
    Weight(
        "decoder.layers.self_attention.linear_proj.weight",
        (_LAYER + "self_attn.o_proj.weight",),
        lambda m: ((m.hidden_size, m.query_width),),
    ),
    Weight(
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        (_LAYER + "post_attention_layernorm.weight",),
        lambda m: ((m.hidden_size,),),
    ),
    Weight(
        "decoder.layers.mlp.linear_fc1.weight",
        (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
        lambda m: ((m.ffn_hidden_size, m.hidden_size),) * 2,
        join_gate_up,
        split_gate_up,
    ),
    Weight(
        "decoder.layers.mlp.linear_fc2.weight",
        (_LAYER + "mlp.down_proj.weight",),
        lambda m: ((m.hidden_size, m.ffn_hidden_size),),
    ),
    Weight("decoder.final_layernorm.weight", ("model.norm.weight",), lambda m: ((m.hidden_size,),)),
)
_HEAD = Weight("output_layer.weight", ("lm_head.weight",), lambda m: ((m.vocab_size, m.hidden_size),))


def weights(model: ModelConfig) -> tuple[Weight, ...]:
    """The mapping table; tied embeddings have no head of their own."""
    return _WEIGHTS if model.share_embeddings_and_output_weights else (*_WEIGHTS, _HEAD)


def is_ignored(hf_name: str, model: ModelConfig) -> bool:
    """Tensors that old checkpoints carry beside the weights: rotary buffers, a copy of tied embeddings."""
    return hf_name.endswith("rotary_emb.inv_freq") or (
        model.share_embeddings_and_output_weights and hf_name == "lm_head.weight"
    )


_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
}
"""Keys that every Llama's config.json has, and their names here."""
_REQUIRED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""Values that are implemented; a config.json without the key means these."""


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Model shape from the values of a Hugging Face Llama's config.json.

    Keys that may be absent or null get the defaults of transformers' LlamaConfig. It is not asked for them: importing
    it takes longer than converting a small checkpoint.

    Raises:
        ValueError: a size that is missing or no number, or a setting that changes the mathematics and is not
            implemented, by name and value.
    """
    for name, supported in _REQUIRED.items():
        if values.get(name, supported) != supported:
            raise ValueError(f"config.json: {name}={values[name]!r} is not supported, only {supported!r}")
    missing = [name for name in _SIZES if values.get(name) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    base, scaling = _rope(values)
    shape = {ours: values[theirs] for theirs, ours in _SIZES.items()}
    given = {name: value for name, value in values.items() if value is not None}
    shape |= {
        "num_query_groups": given.get("num_key_value_heads") or values["num_attention_heads"],
        "kv_channels": given.get("head_dim", 0),
        "max_position_embeddings": given.get("max_position_embeddings", 2048),
        "layernorm_epsilon": given.get("rms_norm_eps", 1e-6),
        "rotary_base": base,
        "rope_scaling": scaling,
        "share_embeddings_and_output_weights": given.get("tie_word_embeddings", False),
    }
    try:
        return parse(ModelConfig, shape)
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from error


def _rope(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """(base, scaling), types not checked. transformers 5 keeps both in `rope_parameters`, 4 in `rope_theta` and
    `rope_scaling`."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: the rope scaling {rope!r} must be a group of keys")
    base = rope.get("rope_theta") or values.get("rope_theta") or 10000.0
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }.get(rope_type)
    if names is None:
        raise ValueError(
            f"config.json: rope scaling of type {rope_type!r} is not supported; default, linear and llama3 are"
        )
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise ValueError(f"config.json: rope scaling of type {rope_type!r} lacks {', '.join(missing)}")
    return base, {"rope_type": rope_type, **{name: rope[name] for name in names}} if names else None
