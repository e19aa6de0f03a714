"""The mapping table of a mixture of experts, under the keys of Megatron's MoE layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nemo_star.config.model import ModelConfig, MoEConfig
from nemo_star.models.families.weights import LAYER, Weight, join_gate_up, vector

PRE_MOE = "pre_mlp_layernorm.weight"
"""The norm before experts is fused with nothing."""


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
    together: bool = False
    """Whether a tensor holds all experts of a layer, gate and up in one, as gpt-oss has it."""


def dense_layers(model: ModelConfig) -> Iterable[int]:
    """Layers with one FFN."""
    return range(model.num_layers) if model.moe is None else model.moe.dense_layers


def expert_layers(model: ModelConfig) -> Iterable[int]:
    """Layers with a mixture of experts."""
    dense = set(dense_layers(model))
    return [layer for layer in range(model.num_layers) if layer not in dense]


def expert_weights(moe: MoEConfig, names: ExpertNames | None) -> list[Weight]:
    """Router, experts and shared expert of the layers that have them."""
    assert names is not None
    mixture = [
        Weight(
            "decoder.layers.mlp.router.weight",
            (f"{LAYER}{names.router}.weight",),
            lambda m: ((moe.num_experts, m.hidden_size),),
            layers=expert_layers,
        ),
    ]
    if moe.router_bias:
        mixture.append(
            vector("mlp.router.bias", f"{names.router}.bias", lambda m: moe.num_experts, expert_layers),
        )
    routed = _together if names.together else _gated
    mixture += routed("mlp.experts.experts", names.experts, moe.ffn_hidden_size, names)
    if moe.add_expert_bias:
        assert names.together, "no family has experts of their own tensors, with biases"
        mixture += _biases_together(moe, names)
    if moe.correction_bias:
        bias = vector("mlp.router.expert_bias", names.correction_bias, lambda m: moe.num_experts, expert_layers)
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


def _together(key: str, prefix: str, ffn: int, names: ExpertNames) -> list[Weight]:
    """The same of tensors that hold all experts of a layer, to be multiplied from the right: [experts, h, 2 ffn], whose
    columns are gate, up, gate, up..., and [experts, ffn, h]."""

    def count(m: ModelConfig) -> int:
        assert m.moe is not None
        return m.moe.num_experts

    return [
        Weight(
            f"decoder.layers.{key}.linear_fc1.weight",
            (f"{LAYER}{prefix}.gate_up_proj",),
            lambda m: ((count(m), m.hidden_size, 2 * ffn),),
            _join_alternating,
            _split_alternating,
            layers=expert_layers,
            joined=lambda m: (count(m), 2 * ffn, m.hidden_size),
            holds_experts=True,
        ),
        Weight(
            f"decoder.layers.{key}.linear_fc2.weight",
            (f"{LAYER}{prefix}.{names.down}",),
            lambda m: ((count(m), ffn, m.hidden_size),),
            lambda parts, m: parts[0].transpose(1, 2),
            lambda whole, m: (whole.transpose(1, 2),),
            layers=expert_layers,
            joined=lambda m: (count(m), m.hidden_size, ffn),
            holds_experts=True,
        ),
    ]


def _biases_together(moe: MoEConfig, names: ExpertNames) -> list[Weight]:
    """Biases of all experts of a layer: [experts, 2 ffn] and [experts, h]."""
    experts, ffn = moe.num_experts, moe.ffn_hidden_size
    return [
        Weight(
            "decoder.layers.mlp.experts.experts.linear_fc1.bias",
            (f"{LAYER}{names.experts}.gate_up_proj_bias",),
            lambda m: ((experts, 2 * ffn),),
            _join_alternating,
            _split_alternating,
            layers=expert_layers,
        ),
        Weight(
            "decoder.layers.mlp.experts.experts.linear_fc2.bias",
            (f"{LAYER}{names.experts}.{names.down}_bias",),
            lambda m: ((experts, m.hidden_size),),
            layers=expert_layers,
        ),
    ]


def _join_alternating(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """[experts, (h,) 2 ffn] with gate and up by turns -> [experts, 2 ffn (, h)], gate first."""
    turns = parts[0].unflatten(-1, (-1, 2))
    return turns.permute(0, *range(turns.ndim - 1, 0, -1)).flatten(1, 2)


def _split_alternating(whole: Tensor, model: ModelConfig) -> Sequence[Tensor]:
    halves = whole.unflatten(1, (2, -1))
    return (halves.permute(0, *range(halves.ndim - 1, 0, -1)).flatten(-2),)
