"""Words of the families' mapping tables: one dist_checkpoint tensor, and the Hugging Face tensors it is made of; and
the table of the decoder that all of them are variations of.

The keys are those of Megatron's GPTModel with Transformer Engine's names for the fused norms, layers stacked in a first
dimension; Megatron's local spec maps its own names to them, so one checkpoint loads in both. Norms of what attention
and FFN give back are named as Megatron-Bridge has them for Gemma 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_star.config.model import ModelConfig, MoEConfig

Shapes = Callable[[ModelConfig], tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Place:
    """Hugging Face tensors, and where they lie in the dist_checkpoint."""

    key: str
    hf_names: tuple[str, ...]
    index: tuple[int, ...] = ()
    """In the first dimensions, over which tensors are stacked: layer, expert."""
    counts: tuple[int, ...] = ()
    """Sizes of these dimensions."""


@dataclass(frozen=True)
class Weight:
    """One dist_checkpoint tensor and the Hugging Face tensors it is made of.

    `{layer}` in a Hugging Face name stands for the 0-based layer, `{expert}` for the expert; such weights are stacked
    over layers (where the key does not name the layer, too), then over experts.
    """

    key: str
    hf_names: tuple[str, ...]
    shapes: Shapes
    """Shape of each Hugging Face tensor."""
    join: Callable[[Sequence[Tensor], ModelConfig], Tensor] = lambda parts, model: parts[0]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]] = lambda whole, model: (whole,)

    layers: Callable[[ModelConfig], Iterable[int]] = lambda model: range(model.num_layers)
    """That have it."""

    keeps_type: bool = False
    """Stored as it is, whatever type the others are converted to."""

    def places(self, model: ModelConfig) -> Iterator[Place]:
        """Layer by layer, expert by expert."""
        name = self.hf_names[0]
        for layer in self.layers(model) if "{layer}" in name else (None,):
            stack = [] if layer is None or "{layer}" in self.key else [(layer, model.num_layers)]
            experts = model.moe.num_experts if model.moe is not None and "{expert}" in name else None
            for expert in (None,) if experts is None else range(experts):
                whole = stack if experts is None else [*stack, (expert, experts)]
                names = tuple(name.format(layer=layer, expert=expert) for name in self.hf_names)
                index, counts = zip(*whole, strict=True) if whole else ((), ())
                yield Place(self.key.format(layer=layer), names, tuple(index), tuple(counts))

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape of the joined tensor, of one layer and expert: all joins are along the first dimension."""
        shapes = self.shapes(model)
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def join_qkv(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Megatron's order: for each query group its query heads, its K head, its V head. Of weights or of biases."""
    rest = parts[0].shape[1:]
    groups = [part.reshape(model.num_query_groups, -1, *rest) for part in parts]
    return torch.cat(groups, dim=1).reshape(-1, *rest)


def split_qkv(whole: Tensor, model: ModelConfig) -> Sequence[Tensor]:
    rest = whole.shape[1:]
    queries = model.query_width // model.num_query_groups
    groups = whole.reshape(model.num_query_groups, -1, *rest)
    parts = groups.split([queries, model.kv_channels, model.kv_channels], dim=1)
    return [part.reshape(-1, *rest) for part in parts]


def join_fused_qkv(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Of one tensor [queries; keys; values]."""
    return join_qkv(parts[0].split([model.query_width, model.kv_width, model.kv_width]), model)


def split_fused_qkv(whole: Tensor, model: ModelConfig) -> Sequence[Tensor]:
    return [torch.cat(list(split_qkv(whole, model)))]


def join_gate_up(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    return torch.cat(tuple(parts), dim=0)


def split_gate_up(whole: Tensor, model: ModelConfig) -> Sequence[Tensor]:
    return whole.split(model.ffn_hidden_size, dim=0)


LAYER = "model.layers.{layer}."
PRE_ATTENTION, PRE_MLP = "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"
POST_ATTENTION, POST_MLP = "self_attention.linear_proj.post_layernorm.weight", "mlp.linear_fc2.post_layernorm.weight"
PRE_MOE = "pre_mlp_layernorm.weight"
"""The norm before experts is fused with nothing."""
LLAMA_NORMS = {PRE_ATTENTION: "input_layernorm", PRE_MLP: "post_attention_layernorm"}


@dataclass(frozen=True)
class ExpertNames:
    """What Hugging Face calls the parts of a mixture of experts, below the layer."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts.{expert}"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "mlp.shared_experts"
    correction_bias: str = "mlp.gate.e_score_correction_bias"


def dense_layers(model: ModelConfig) -> Iterable[int]:
    """Layers with one FFN."""
    return range(model.num_layers) if model.moe is None else model.moe.dense_layers


def expert_layers(model: ModelConfig) -> Iterable[int]:
    """Layers with a mixture of experts."""
    dense = set(dense_layers(model))
    return [layer for layer in range(model.num_layers) if layer not in dense]


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
        table += [_vector(PRE_MOE, f"{norms[PRE_MLP]}.weight", lambda m: m.hidden_size, expert_layers)]
        table += _experts(model.moe, experts)
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


def each_layer_named(table: Iterable[Weight]) -> list[Weight]:
    """The same table with keys that name each layer, instead of stacking all."""
    stacked = ".layers."
    return [
        weight if "{layer}" in weight.key else replace(weight, key=weight.key.replace(stacked, ".layers.{layer}."))
        for weight in table
    ]


def _norm(key: str, name: str, model: ModelConfig) -> Weight:
    """Of every layer, but the norm before an FFN: of those that have one."""
    layers = dense_layers if key == PRE_MLP else _all_layers
    return _vector(key, name, lambda m: m.hidden_size, layers)


def _all_layers(model: ModelConfig) -> Iterable[int]:
    return range(model.num_layers)


def _vector(
    key: str,
    name: str,
    size: Callable[[ModelConfig], int],
    layers: Callable[[ModelConfig], Iterable[int]] = _all_layers,
) -> Weight:
    """A norm, or a bias that is stored as it is."""
    return Weight(f"decoder.layers.{key}", (LAYER + name,), lambda m: ((size(m),),), layers=layers)


def _experts(moe: MoEConfig, names: ExpertNames | None) -> list[Weight]:
    """Router, experts and shared expert of the layers that have them."""
    assert names is not None
    mixture = [
        Weight(
            "decoder.layers.mlp.router.weight",
            (f"{LAYER}{names.router}.weight",),
            lambda m: ((moe.num_experts, m.hidden_size),),
            layers=expert_layers,
        ),
        *_gated("mlp.experts.experts", names.experts, moe.ffn_hidden_size, names),
    ]
    if moe.correction_bias:
        bias = _vector("mlp.router.expert_bias", names.correction_bias, lambda m: moe.num_experts, expert_layers)
        mixture.append(replace(bias, keeps_type=True))
    if moe.shared_ffn_hidden_size:
        mixture += _gated("mlp.shared_experts", names.shared, moe.shared_ffn_hidden_size, names)
    return mixture


def _gated(key: str, prefix: str, ffn: int, names: ExpertNames) -> list[Weight]:
    """The two matrices of an expert."""
    first = tuple(f"{LAYER}{prefix}.{name}.weight" for name in (names.gate, names.up))
    return [
        Weight(
            f"decoder.layers.{key}.linear_fc1.weight",
            first,
            lambda m: ((ffn, m.hidden_size),) * 2,
            join_gate_up,
            lambda whole, m: whole.split(ffn, dim=0),
            layers=expert_layers,
        ),
        Weight(
            f"decoder.layers.{key}.linear_fc2.weight",
            (f"{LAYER}{prefix}.{names.down}.weight",),
            lambda m: ((m.hidden_size, ffn),),
            layers=expert_layers,
        ),
    ]


def _attention(model: ModelConfig, fused: bool) -> list[Weight]:
    table = [_qkv("weight", fused)]
    if model.add_qkv_bias:
        table.append(_qkv("bias", fused))
    if model.qk_norm != "none":
        heads = model.qk_norm == "projection"
        table.append(
            _vector(
                "self_attention.q_layernorm.weight",
                "self_attn.q_norm.weight",
                lambda m: m.query_width if heads else m.kv_channels,
            )
        )
        table.append(
            _vector(
                "self_attention.k_layernorm.weight",
                "self_attn.k_norm.weight",
                lambda m: m.kv_width if heads else m.kv_channels,
            )
        )
    table.append(
        Weight(
            "decoder.layers.self_attention.linear_proj.weight",
            (LAYER + "self_attn.o_proj.weight",),
            lambda m: ((m.hidden_size, m.query_width),),
        )
    )
    if model.add_projection_bias:
        table.append(_vector("self_attention.linear_proj.bias", "self_attn.o_proj.bias", lambda m: m.hidden_size))
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
        table.append(_vector("mlp.linear_fc2.bias", "mlp.down_proj.bias", lambda m: m.hidden_size))
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
