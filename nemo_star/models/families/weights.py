"""Words of the families' mapping tables: one dist_checkpoint tensor, and the Hugging Face tensors it is made of.

The keys are those of Megatron's GPTModel with Transformer Engine's names for the fused norms, layers stacked in a first
dimension; Megatron's local spec maps its own names to them, so one checkpoint loads in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_star.config.model import ModelConfig

Shapes = Callable[[ModelConfig], tuple[tuple[int, ...], ...]]
LAYER = "model.layers.{layer}."


def all_layers(model: ModelConfig) -> Iterable[int]:
    return range(model.num_layers)


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

    layers: Callable[[ModelConfig], Iterable[int]] = all_layers
    """That have it."""

    joined: Callable[[ModelConfig], tuple[int, ...]] | None = None
    """Shape of the joined tensor, of one layer and expert; None: the parts lie one after the other."""
    holds_experts: bool = False
    """The parts, and what is joined of them, hold all experts of a layer in their first dimension. They are stored
    expert by expert, as where each is a tensor of its own: a rank reads those that it holds."""

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
        """Shape of the joined tensor, of one layer and expert."""
        if self.joined is not None:
            return self.joined(model)
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


def vector(
    key: str,
    name: str,
    size: Callable[[ModelConfig], int],
    layers: Callable[[ModelConfig], Iterable[int]] = all_layers,
) -> Weight:
    """A norm, a bias or sinks, stored as they are, by their names in a layer."""
    return Weight(f"decoder.layers.{key}", (LAYER + name,), lambda m: ((size(m),),), layers=layers)


def each_layer_named(table: Iterable[Weight]) -> list[Weight]:
    """The same table with keys that name each layer, instead of stacking all."""
    stacked = ".layers."
    return [
        weight if "{layer}" in weight.key else replace(weight, key=weight.key.replace(stacked, ".layers.{layer}."))
        for weight in table
    ]
