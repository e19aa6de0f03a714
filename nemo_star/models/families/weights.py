"""Words of the families' mapping tables: one dist_checkpoint tensor, and the Hugging Face tensors it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_star.config.model import ModelConfig


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
