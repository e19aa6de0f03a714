"""Megatron's linear layers around a product of another function, in decode.

What its modules, and Transformer Engine's beneath them, compute in 32 and 16 bits is little (Transformer Engine 2.9,
pytorch/module/linear.py, `forward`; Megatron-core 0.16, core/tensor_parallel/layers.py):

    column    x W^T + bias; where the bias is returned, it is not added
    row       x W^T, summed over tp, then + bias; or the bias is returned
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_star.attention.step import AttentionState, DecodeStep
from nemo_star.kernels import few_rows
from nemo_star.models.decode_sharding import PhasedMLP
from nemo_star.models.te_weights import bias_of

ROW = ("linear_proj", "linear_fc2")
"""Places in Megatron's layers of what is divided over tp by the rows of W^T."""

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x, weight, bias) -> out, as `torch.nn.functional.linear`."""


class DirectLinear(nn.Module):
    """A linear layer; in decode `product`, with its weights.

    Args:
        tp_group: over which the results are summed (rows); None: a layer divided by columns.
    """

    linear: Any

    def __init__(
        self,
        linear: nn.Module,
        state: AttentionState,
        tp_group: dist.ProcessGroup | None = None,
        product: Product = F.linear,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.state = state
        self.tp_group = tp_group if tp_group is not None and tp_group.size() > 1 else None
        self.product = product

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [s, b, in] -> (out [s, b, out], bias where the caller is to add it, else None)."""
        if not isinstance(self.state.step, DecodeStep):
            result: tuple[Tensor, Tensor | None] = self.linear(x)
            return result
        return self.multiplied(x)

    def multiplied(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same, by `product`."""
        bias, weight = bias_of(self.linear), self.linear.weight
        added = None if self._returns_bias else bias
        if self.tp_group is None:
            out = self.product(x, weight, added)
        else:
            out = self.product(x, weight, None)
            dist.all_reduce(out, group=self.tp_group)
            out = out if added is None else out + added
        return out, bias if self._returns_bias else None

    @property
    def _returns_bias(self) -> bool:
        """Megatron's name of it, and that of its classes over Transformer Engine."""
        name = "te_return_bias" if hasattr(self.linear, "te_return_bias") else "skip_bias_add"
        returns: bool = getattr(self.linear, name)
        return returns


def parts_with_linears(model: GPTModel, state: AttentionState) -> Iterator[nn.Module]:
    """The modules of a GPTModel, after `decode_sharding.install`, of which linear layers and norms are direct parts;
    not those that cp ranks divide in decode."""
    for layer in model.decoder.layers:
        yield layer
        yield layer.self_attention
        if isinstance(layer.mlp, PhasedMLP) and state.decode_group is None:
            yield layer.mlp.mlp


def install_few_rows(model: GPTModel, state: AttentionState) -> None:
    """Let Megatron's own layers multiply by `kernels.few_rows`, in a GPTModel whose weights are loaded; where those are
    large enough for it."""
    for part in parts_with_linears(model, state):
        for name, linear in list(part.named_children()):
            if isinstance(linear, ColumnParallelLinear | RowParallelLinear) and few_rows.fits(linear.weight):
                tp_group = model.tp_group if name in ROW else None
                setattr(part, name, DirectLinear(linear, state, tp_group, few_rows.linear))
