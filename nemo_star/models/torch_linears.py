"""Transformer Engine's linear layers and norms through torch's functions, in decode.

A call of one of its modules takes the host long (autocast and FP8 states, workspaces, an autograd function with some
fifty arguments), which is nothing beside a block of a context and more than the device needs for a token. Before the
product (`direct_linears.py`) some have a norm (release 2.9, pytorch/module/layernorm_linear.py, `forward`): RMSNorm in
float32, its weight + 1 where it is zero-centred, rounded to the input's type.

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

from nemo_star.attention.step import AttentionState, DecodeStep
from nemo_star.models.direct_linears import ROW, DirectLinear, parts_with_linears
from nemo_star.models.layer_spec import implementation_for
from nemo_star.models.te_weights import rms_norm

_NORMS = ("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm", "final_layernorm")
_COLUMN = ("linear_qkv", "linear_fc1")
"""Places in Megatron's layers; as `direct_linears.ROW`."""


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


class TorchLinear(DirectLinear):
    """A linear layer of Transformer Engine, with or without a norm before it; in decode torch's, with its weights."""

    def __init__(
        self,
        linear: nn.Module,
        state: AttentionState,
        config: TransformerConfig,
        tp_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(linear, state, tp_group)
        self.config = config

    def multiplied(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [s, b, in] -> (out [s, b, out], bias where the caller is to add it, else None)."""
        if (gamma := getattr(self.linear, "layer_norm_weight", None)) is not None:
            x = rms_norm(x, gamma, self.config)
        return super().multiplied(x)


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
    for part in parts_with_linears(model, state):
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
        elif name in ROW:
            setattr(part, name, TorchLinear(module, state, model.config, model.tp_group))


def _is_transformer_engine_s(module: nn.Module) -> bool:
    return any(base.__module__.partition(".")[0] == "transformer_engine" for base in type(module).__mro__)
