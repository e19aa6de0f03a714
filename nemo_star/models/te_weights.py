"""What Transformer Engine's modules hold, used by torch's functions."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


def bias_of(linear: Any) -> Tensor | None:
    """A linear layer's bias; Transformer Engine's layers without one have an empty one."""
    bias: Tensor | None = linear.bias
    return bias if bias is not None and bias.numel() else None


def rms_norm(x: Tensor, weight: Tensor, config: TransformerConfig) -> Tensor:
    """The RMSNorm that begins a `LayerNormLinear`, or stands alone; of x's shape and type.

    Args:
        weight: [h]; 1 is added to it where the configuration says that it is centred at zero.
    """
    shape, eps = (x.shape[-1],), config.layernorm_epsilon
    if not config.layernorm_zero_centered_gamma:
        return F.rms_norm(x, shape, weight, eps)
    # The sum would be rounded to 16 bits, and most of the weight with it: float32, as Transformer Engine has it.
    return F.rms_norm(x.float(), shape, weight.float() + 1.0, eps).to(x.dtype)
