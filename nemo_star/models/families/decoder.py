"""The mapping table of the decoder that all families are variations of.

Norms of what attention and FFN give back are named as Megatron-Bridge has them for Gemma 3, sinks as it has them for
gpt-oss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nemo_star.config.model import ModelConfig
from nemo_star.models.families.experts import PRE_MOE, ExpertNames, dense_layers, expert_layers, expert_weights
from nemo_star.models.families.weights import (
    LAYER,
    Weight,
    all_layers,
    each_layer_named,
    join_fused_qkv,
    join_gate_up,
    join_qkv,
    split_fused_qkv,
    split_gate_up,
    split_qkv,
    vector,
)

PRE_ATTENTION, PRE_MLP = "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"
POST_ATTENTION, POST_MLP = "self_attention.linear_proj.post_layernorm.weight", "mlp.linear_fc2.post_layernorm.weight"
LLAMA_NORMS = {PRE_ATTENTION: "input_layernorm", PRE_MLP: "post_attention_layernorm"}


def decoder_weights(
    model: ModelConfig,
    *,
    norms: Mapping[str, str] = LLAMA_NORMS,
    fused_qkv: bool = False,
    fused_gate_up: bool = False,
    experts: ExpertNames | None = None,
) -> tuple[Weight, ...]:
    """The mapping table of a decoder with Llama's names, attention and MLP as `model` says; tied embeddings have no
    head of their own.

    Args:
        norms: key in a layer -> Hugging Face's name.
        fused_qkv, fused_gate_up: Hugging Face keeps them as one tensor.
        experts: names in layers that have experts.
    """
    table = [
        *(_norm(key, f"{name}.weight", model) for key, name in norms.items()),
        *_attention(model, fused_qkv),
        *_mlp(model, fused_gate_up),
    ]
    if model.moe is not None:
        table += [vector(PRE_MOE, f"{norms[PRE_MLP]}.weight", lambda m: m.hidden_size, expert_layers)]
        table += expert_weights(model.moe, experts)
    if model.layers_differ:
        table = each_layer_named(table)
    table += [
        Weight(
            "embedding.word_embeddings.weight",
            ("model.embed_tokens.weight",),
            lambda m: ((m.vocab_size, m.hidden_size),),
        ),
        Weight("decoder.final_layernorm.weight", ("model.norm.weight",), lambda m: ((m.hidden_size,),)),
    ]
    if not model.share_embeddings_and_output_weights:
        table.append(
            Weight("output_layer.weight", ("lm_head.weight",), lambda m: ((m.vocab_size, m.hidden_size),)),
        )
    return tuple(table)


def _norm(key: str, name: str, model: ModelConfig) -> Weight:
    """Of every layer, but the norm before an FFN: of those that have one."""
    layers = dense_layers if key == PRE_MLP else all_layers
    return vector(key, name, lambda m: m.hidden_size, layers)


def _attention(model: ModelConfig, fused: bool) -> list[Weight]:
    table = [_qkv("weight", fused)]
    if model.add_qkv_bias:
        table.append(_qkv("bias", fused))
    if model.qk_norm != "none":
        heads = model.qk_norm == "projection"
        table.append(
            vector(
                "self_attention.q_layernorm.weight",
                "self_attn.q_norm.weight",
                lambda m: m.query_width if heads else m.kv_channels,
            )
        )
        table.append(
            vector(
                "self_attention.k_layernorm.weight",
                "self_attn.k_norm.weight",
                lambda m: m.kv_width if heads else m.kv_channels,
            )
        )
    if model.attention_sinks:
        key = "self_attention.core_attention.softmax_offset"
        table.append(vector(key, "self_attn.sinks", lambda m: m.num_attention_heads))
    table.append(
        Weight(
            "decoder.layers.self_attention.linear_proj.weight",
            (LAYER + "self_attn.o_proj.weight",),
            lambda m: ((m.hidden_size, m.query_width),),
        )
    )
    if model.add_projection_bias:
        table.append(vector("self_attention.linear_proj.bias", "self_attn.o_proj.bias", lambda m: m.hidden_size))
    return table


def _qkv(what: str, fused: bool) -> Weight:
    """Weight or bias of queries, keys and values."""

    def shapes(m: ModelConfig) -> tuple[tuple[int, ...], ...]:
        rest = (m.hidden_size,) if what == "weight" else ()
        rows = (m.query_width, m.kv_width, m.kv_width)
        return ((sum(rows), *rest),) if fused else tuple((row, *rest) for row in rows)

    names = ("self_attn.qkv_proj",) if fused else tuple(f"self_attn.{part}_proj" for part in "qkv")
    return Weight(
        f"decoder.layers.self_attention.linear_qkv.{what}",
        tuple(f"{LAYER}{name}.{what}" for name in names),
        shapes,
        join_fused_qkv if fused else join_qkv,
        split_fused_qkv if fused else split_qkv,
    )


def _mlp(model: ModelConfig, fused: bool) -> list[Weight]:
    table = [_gate_up("weight", fused)]
    if model.add_mlp_bias:
        table.append(_gate_up("bias", fused))
    table.append(
        Weight(
            "decoder.layers.mlp.linear_fc2.weight",
            (LAYER + "mlp.down_proj.weight",),
            lambda m: ((m.hidden_size, m.ffn_hidden_size),),
        )
    )
    if model.add_mlp_bias:
        table.append(vector("mlp.linear_fc2.bias", "mlp.down_proj.bias", lambda m: m.hidden_size))
    return [replace(weight, layers=dense_layers) for weight in table]


def _gate_up(what: str, fused: bool) -> Weight:
    """Weight or bias of the gated FFN's two projections; Megatron keeps [gate; up] as Phi and GLM do."""

    def shapes(m: ModelConfig) -> tuple[tuple[int, ...], ...]:
        rest = (m.hidden_size,) if what == "weight" else ()
        rows = (2 * m.ffn_hidden_size,) if fused else (m.ffn_hidden_size, m.ffn_hidden_size)
        return tuple((row, *rest) for row in rows)

    key = f"decoder.layers.mlp.linear_fc1.{what}"
    if fused:
        return Weight(key, (f"{LAYER}mlp.gate_up_proj.{what}",), shapes)
    names = (f"{LAYER}mlp.gate_proj.{what}", f"{LAYER}mlp.up_proj.{what}")
    return Weight(key, names, shapes, join_gate_up, split_gate_up)
