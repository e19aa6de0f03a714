"""Norms that Megatron's layers have no place for, as modules for places that they do have.

A layer's spec names a norm before attention and FFN, and one a head for queries and keys. OLMo 2, GLM-4 and Gemma 3
also norm what attention and FFN give back, OLMo 2 all heads of queries and keys at once, and Gemma's norms multiply by
1 + weight, which Megatron leaves to Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension (arXiv 1910.07467), computed in float32, as transformers has it.

    Args:
        zero_centered: multiply by 1 + weight, before the result is rounded to the input's type.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, zero_centered: bool = False
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape and type."""
        wide = x.float()
        return self._weighted(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps), x.dtype)

    def _weighted(self, normed: Tensor, dtype: torch.dtype) -> Tensor:
        if self.zero_centered:
            return (normed * (1.0 + self.weight.float())).to(dtype)
        return self.weight * normed.to(dtype)


class ZeroCenteredRMSNorm(RMSNorm):
    """In place of Megatron's own norm, with the arguments that its layers give."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config, hidden_size, eps, zero_centered=True)


class ProjectionNorm(RMSNorm):
    """RMSNorm over all heads of queries or of keys, in the place of the norm of one head: [sq, b, heads, hn].

    Heads are divided over tp ranks, and so is the weight [heads * hn]; the sum of squares is theirs together.

    Args:
        heads: of all tp ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, *, heads: int, tp_group: dist.ProcessGroup
    ) -> None:
        super().__init__(config, heads // tp_group.size() * hidden_size, eps)
        self.tp_group = tp_group
        self.width = heads * hidden_size

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape and type."""
        wide = x.flatten(2).float()
        squares = wide.square().sum(-1, keepdim=True)
        if self.tp_group.size() > 1:
            dist.all_reduce(squares, group=self.tp_group)
        return self._weighted(wide * torch.rsqrt(squares / self.width + self.eps), x.dtype).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's dist_checkpointing."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


class NormedAdd(nn.Module):
    """residual + norm(output + bias), in the place of Megatron's `get_bias_dropout_add`."""

    def __init__(self, config: TransformerConfig, *, zero_centered: bool) -> None:
        super().__init__()
        self.post_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon, zero_centered=zero_centered)

    def forward(self, training: bool, fused: bool) -> Callable[[Any, Tensor, float], Tensor]:
        """Megatron's layers ask for the function first: (output, bias or None), residual, dropout -> hidden states."""
        return self._add

    def _add(self, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_with_bias
        return residual + self.post_layernorm(output if bias is None else output + bias)
