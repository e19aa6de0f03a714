"""Llama 2, 3, 3.1, 3.2: Hugging Face names and configuration <-> Megatron's dist_checkpoint keys.

The keys are those of Megatron's GPTModel with Transformer Engine's names for the fused norms, layers stacked in a first
dimension; Megatron's local spec maps its own names to them, so one checkpoint loads in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_star.config.model import ModelConfig
from nemo_star.config.strict import parse

ARCHITECTURE = "LlamaForCausalLM"


@dataclass(frozen=True)
class Weight:
    """One dist_checkpoint tensor and the Hugging Face tensors it is made of.

    `{layer}` in a Hugging Face name stands for the 0-based layer; such weights are stacked over layers.
    """

    key: str
    hf_names: tuple[str, ...]
    shapes: Callable[[ModelConfig], tuple[tuple[int, ...], ...]]
    """Shape of each Hugging Face tensor."""
    join: Callable[[Sequence[Tensor], ModelConfig], Tensor] = lambda parts, model: parts[0]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]] = lambda whole, model: (whole,)

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf_names[0]

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape of the joined tensor (of one layer): all joins are along the first dimension."""
        shapes = self.shapes(model)
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def join_qkv(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Megatron's order: for each query group its query heads, its K head, its V head."""
    groups = [part.reshape(model.num_query_groups, -1, model.hidden_size) for part in parts]
    return torch.cat(groups, dim=1).reshape(-1, model.hidden_size)


def split_qkv(whole: Tensor, model: ModelConfig) -> Sequence[Tensor]:
    queries = model.query_width // model.num_query_groups
    groups = whole.reshape(model.num_query_groups, -1, model.hidden_size)
    parts = groups.split([queries, model.kv_channels, model.kv_channels], dim=1)
    return [part.reshape(-1, model.hidden_size) for part in parts]


def join_gate_up(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    return torch.cat(tuple(parts), dim=0)


def split_gate_up(whole: Tensor, model: ModelConfig) -> Sequence[Tensor]:
    return whole.split(model.ffn_hidden_size, dim=0)


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
    kind = rope.get("rope_type") or rope.get("type") or "default"
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }.get(kind)
    if names is None:
        raise ValueError(f"config.json: rope scaling of type {kind!r} is not supported; default, linear and llama3 are")
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise ValueError(f"config.json: rope scaling of type {kind!r} lacks {', '.join(missing)}")
    return base, {"rope_type": kind, **{name: rope[name] for name in names}} if names else None
