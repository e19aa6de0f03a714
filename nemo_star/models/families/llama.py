"""Llama 2, 3, 3.1, 3.2: Hugging Face names and configuration <-> Megatron's dist_checkpoint keys.

The keys are those of Megatron's GPTModel with Transformer Engine's names for the fused norms, layers stacked in a first
dimension; Megatron's local spec maps its own names to them, so one checkpoint loads in both.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from nemo_star.config.model import ModelConfig, RopeScaling
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


def model_config(hf: PretrainedConfig) -> ModelConfig:
    """Model shape from a Hugging Face Llama configuration.

    Raises:
        ValueError: a setting that changes the mathematics and is not implemented, by name and value.
    """
    required = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for name, value in required.items():
        if getattr(hf, name, value) != value:
            raise ValueError(f"config.json: {name}={getattr(hf, name)!r} is not supported, only {value!r}")
    base, scaling = _rope(hf)
    return ModelConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads or hf.num_attention_heads,
        ffn_hidden_size=hf.intermediate_size,
        kv_channels=getattr(hf, "head_dim", None) or hf.hidden_size // max(1, hf.num_attention_heads),
        vocab_size=hf.vocab_size,
        max_position_embeddings=hf.max_position_embeddings,
        layernorm_epsilon=float(hf.rms_norm_eps),
        rotary_base=base,
        rope_scaling=scaling,
        share_embeddings_and_output_weights=bool(hf.tie_word_embeddings),
    )


def _rope(hf: PretrainedConfig) -> tuple[float, RopeScaling | None]:
    """(base, scaling). transformers 5 keeps both in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    values = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    base = float(values.get("rope_theta") or getattr(hf, "rope_theta", None) or 10000.0)
    rope_type = values.get("rope_type") or values.get("type") or "default"
    if rope_type == "default":
        return base, None
    if rope_type == "linear":
        return base, RopeScaling("linear", factor=float(values["factor"]))
    if rope_type != "llama3":
        raise ValueError(
            f"config.json: rope scaling of type {rope_type!r} is not supported; default, linear and llama3 are"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise ValueError(f"config.json: rope scaling of type 'llama3' lacks {', '.join(missing)}")
    return base, RopeScaling(
        "llama3",
        factor=float(values["factor"]),
        low_freq_factor=float(values["low_freq_factor"]),
        high_freq_factor=float(values["high_freq_factor"]),
        original_max_position_embeddings=int(values["original_max_position_embeddings"]),
    )
