"""Transformer Engine's linear layers and norms through torch's functions, in decode.

A call of one of its modules takes the host long (autocast and FP8 states, workspaces, an autograd function with some
fifty arguments), which is nothing beside a block of a context and more than the device needs for a token. What the
modules compute in 16 bits is little (release 2.9, pytorch/module/linear.py and layernorm_linear.py, `forward`):

    column    x W^T + bias; where the bias is returned (`return_bias`), it is not added
    row       x W^T, summed over tp, then + bias: `gemm_bias_unfused_add`; or the bias is returned
    norm      RMSNorm in float32, its weight + 1 where it is zero-centred, rounded to the input's type

Megatron's classes over them (core/extensions/transformer_engine.py) always return (out, bias), the bias None unless
Transformer Engine returns it (`te_return_bias`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_star.attention.step import AttentionState, DecodeStep
from nemo_star.models.decode_sharding import PhasedMLP
from nemo_star.models.layer_spec import implementation_for
from nemo_star.models.te_weights import bias_of, rms_norm

_NORMS = ("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm", "final_layernorm")
_COLUMN, _ROW = ("linear_qkv", "linear_fc1"), ("linear_proj", "linear_fc2")
"""Places in Megatron's layers, in whose names it says what is divided over tp."""


class TorchNorm(nn.Module):
    """Transformer Engine's RMSNorm; in decode torch's, with its weight."""

    norm: Any

    def __init__(self, norm: nn.Module, state: AttentionState, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = norm
        self.state = state
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape and type."""
        if not isinstance(self.state.step, DecodeStep):
            return self.norm(x)
        return rms_norm(x, self.norm.weight, self.config)


class TorchLinear(nn.Module):
    """A linear layer of Transformer Engine, with or without a norm before it; in decode torch's, with its weights.

    Args:
        tp_group: over which the results are summed (rows); None: a layer divided by columns.
    """

    linear: Any

    def __init__(
        self,
        linear: nn.Module,
        state: AttentionState,
        config: TransformerConfig,
        tp_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.state = state
        self.config = config
        self.tp_group = tp_group if tp_group is not None and tp_group.size() > 1 else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [s, b, in] -> (out [s, b, out], bias where the caller is to add it, else None)."""
        linear = self.linear
        if not isinstance(self.state.step, DecodeStep):
            return linear(x)
        if (gamma := getattr(linear, "layer_norm_weight", None)) is not None:
            x = rms_norm(x, gamma, self.config)
        bias = bias_of(linear)
        added = None if linear.te_return_bias else bias
        if self.tp_group is None:
            out = F.linear(x, linear.weight, added)
        else:
            out = F.linear(x, linear.weight)
            dist.all_reduce(out, group=self.tp_group)
            out = out if added is None else out + added
        return out, bias if linear.te_return_bias else None


def check_torch_linears(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse `decode.torch_linears` where layers are Megatron's own.

    Raises:
        ValueError: says which they are.
    """
    if implementation_for(device, dtype) != "transformer_engine":
        raise ValueError(
            f"decode.torch_linears=true is for Transformer Engine's layers; on {device.type} in "
            f"{str(dtype).removeprefix('torch.')} they are Megatron's own here, which call torch's functions anyway: "
            "leave it false"
        )


def install_torch_linears(model: GPTModel, state: AttentionState) -> None:
    """Put the modules above around Transformer Engine's, in a GPTModel whose weights are loaded, after
    `decode_sharding.install`: what cp ranks divide in decode is torch's there already.

    Raises:
        ValueError: norms that are no RMSNorm, or weights in FP8 or FP4.
    """
    config = model.config
    if config.normalization != "RMSNorm":
        raise ValueError(f"decode.torch_linears=true computes RMSNorm, not {config.normalization}")
    if getattr(config, "fp8", None) or getattr(config, "fp4", None):
        raise ValueError("decode.torch_linears=true multiplies weights of 16 bits, and this model's are in FP8 or FP4")
    for layer in model.decoder.layers:
        parts = [layer, layer.self_attention]
        if isinstance(layer.mlp, PhasedMLP) and state.decode_group is None:
            parts.append(layer.mlp.mlp)
        for part in parts:
            _replace(part, state, model)
    _replace(model.decoder, state, model)


def _replace(part: nn.Module, state: AttentionState, model: GPTModel) -> None:
    """Those of Transformer Engine's modules that are direct parts of this one."""
    for name, module in list(part.named_children()):
        if not _is_transformer_engine_s(module):
            continue
        if name in _NORMS:
            setattr(part, name, TorchNorm(module, state, model.config))
        elif name in _COLUMN:
            setattr(part, name, TorchLinear(module, state, model.config))
        elif name in _ROW:
            setattr(part, name, TorchLinear(module, state, model.config, model.tp_group))


def _is_transformer_engine_s(module: nn.Module) -> bool:
    return any(base.__module__.partition(".")[0] == "transformer_engine" for base in type(module).__mro__)
