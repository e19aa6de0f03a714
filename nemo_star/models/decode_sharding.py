"""Decode that uses all cp ranks: each computes its slice of what would be the same work on all of them.

In decode the activations are the same on every cp rank. So a rank takes only its columns of fc1 and rows of fc2
(views of weights it holds anyway), and one all-reduce over tp x cp takes the place of tp's; likewise the output
projection of attention by channels, and the head by rows of the vocabulary (in pipeline.py). A token then reads 1/cp
of these weights (compare Helix Parallelism, arXiv 2507.07120: attention over K/V shards, then the same ranks as
tensor parallel FFN).

In prefill ranks hold different tokens and nothing is sliced; there the same module runs the MLP in chunks, because its
intermediate result is several times as large as a block's hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from nemo_star.attention.step import AttentionState, DecodeStep, PrefillStep
from nemo_star.config.model import MLP_CHUNK_TOKENS
from nemo_star.kernels import few_rows
from nemo_star.methods.partition import shares
from nemo_star.models.moe import MoE
from nemo_star.models.te_weights import bias_of, rms_norm
from nemo_star.parallel.decode_slices import Sliced


def own_slice(size: int, group: dist.ProcessGroup, tp_size: int) -> slice:
    """This rank's share of `size` rows or columns of its tp shard; `group` is tp x cp, tp fastest."""
    start, stop = shares(size, group.size() // tp_size)[group.rank() // tp_size]
    return slice(start, stop)


class PhasedMLP(nn.Module):
    """Megatron's MLP, in chunks of tokens while the context is encoded, a slice of it in sharded decode.

    Args:
        is_last: of the model's last layer, whose results nobody reads while a context is encoded.

    Raises:
        ValueError: sharded decode of an MLP with experts or a fused norm that is no RMSNorm.
    """

    mlp: Any

    def __init__(self, mlp: nn.Module, state: AttentionState, *, is_last: bool = False) -> None:
        super().__init__()
        self.mlp = mlp
        self.state = state
        self.is_last = is_last
        if state.decode_group is not None:
            self._check_sliceable()

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden [s, b, h] -> (out [s, b, h], bias or None)."""
        if self.is_last and isinstance(self.state.step, PrefillStep) and not self.state.completes_prefill:
            return torch.zeros_like(hidden), None
        if isinstance(self.state.step, DecodeStep) and self.state.decode_group is not None:
            return self._slice(hidden, self.state.decode_group), bias_of(self.mlp.linear_fc2)
        if hidden.shape[0] <= MLP_CHUNK_TOKENS:
            return self.mlp(hidden, *args, **kwargs)
        out, bias = torch.empty_like(hidden), None
        for chunk, into in zip(hidden.split(MLP_CHUNK_TOKENS), out.split(MLP_CHUNK_TOKENS), strict=True):
            result, bias = self.mlp(chunk, *args, **kwargs)
            into.copy_(result)
        return out, bias

    def _slice(self, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        """This rank's columns of fc1 and rows of fc2, summed over tp x cp."""
        config = self.mlp.config
        fc1, fc2 = self.mlp.linear_fc1.weight, self.mlp.linear_fc2.weight  # [(2) ffn / tp, h], [h, ffn / tp]
        if (gamma := self._norm_weight) is not None:
            hidden = rms_norm(hidden, gamma, config)
        mine = own_slice(fc2.shape[1], group, self.mlp.tp_group.size())
        width = fc2.shape[1]
        first, *second = fc1.split(width)  # gated: [gate; up]
        bias = bias_of(self.mlp.linear_fc1)
        biases = [None, None] if bias is None else [of[mine] for of in bias.split(width)]
        inner = config.activation_func(few_rows.linear(hidden, first[mine], biases[0]))
        if second:
            inner = inner * few_rows.linear(hidden, second[0][mine], biases[1])
        out = few_rows.linear(inner, fc2[:, mine])
        dist.all_reduce(out, group=group)
        return out

    @property
    def _norm_weight(self) -> Tensor | None:
        """[h] of the norm that Transformer Engine's fc1 begins with."""
        return getattr(self.mlp.linear_fc1, "layer_norm_weight", None)

    def _check_sliceable(self) -> None:
        mlp = self.mlp
        if not hasattr(mlp, "linear_fc1"):
            raise ValueError(f"parallel.decode=sharded slices an MLP of two linear layers, not {type(mlp).__name__}")
        if getattr(mlp.config, "activation_func_clamp_value", None) or getattr(mlp.config, "glu_linear_offset", 0):
            raise ValueError("parallel.decode=sharded computes gated units without clamp and offset")
        if self._norm_weight is not None and mlp.config.normalization != "RMSNorm":
            raise ValueError(f"parallel.decode=sharded computes RMSNorm, not {mlp.config.normalization}")


class SlicedProjection(nn.Module):
    """Attention's output projection, over a slice of its input channels in sharded decode."""

    projection: Any

    def __init__(self, projection: nn.Module, state: AttentionState, tp_size: int) -> None:
        super().__init__()
        self.projection = projection
        self.state = state
        self._tp_size = tp_size

    def forward(self, attended: Tensor) -> tuple[Tensor, Tensor | None]:
        """attended [s, b, np * hn] -> (out [s, b, h], bias or None)."""
        group = self.state.decode_group
        if not isinstance(self.state.step, DecodeStep) or group is None:
            return self.projection(attended)
        mine = own_slice(attended.shape[-1], group, self._tp_size)
        out = few_rows.linear(attended[..., mine], self.projection.weight[:, mine])
        dist.all_reduce(out, group=group)
        return out, bias_of(self.projection)


def install(model: GPTModel, state: AttentionState, sliced: frozenset[Sliced] = frozenset({"ffn"})) -> None:
    """Put the modules above into a GPTModel whose weights are loaded; `state.decode_group` turns slicing on.

    The parts of a built model are replaced, not those of its layer spec: how a spec names its MLP differs between
    Megatron's releases, and a checkpoint knows the parts by their original places.

    Args:
        sliced: what sharded decode divides (`decode_slices.sliced_matrices`).
    """
    for layer in model.decoder.layers:
        is_last = layer.layer_number == model.config.num_layers
        if isinstance(layer.mlp, MoE):  # which does the same for itself
            layer.mlp.is_last = is_last
        else:
            layer.mlp = PhasedMLP(layer.mlp, state, is_last=is_last)
        if state.decode_group is not None and "projection" in sliced:
            attention = layer.self_attention
            attention.linear_proj = SlicedProjection(attention.linear_proj, state, model.tp_group.size())
