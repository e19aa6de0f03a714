"""Rotary embedding by position id.

Megatron's `RotaryEmbedding` derives positions from the sequence length, slices them over cp ranks and wants CUDA; Star
Attention needs the position of each token in flight, for instance an anchor's followed by a block's. Its Llama 3
scaling also hard-codes the factors of one checkpoint; here they come from the model's own configuration.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_star.config.model import RopeScaling


def inverse_frequencies(dim: int, base: float, scaling: RopeScaling | None) -> Tensor:
    """[dim / 2] float32 radians per position.

    `linear` is position interpolation (arXiv 2306.15595); `llama3` (Llama 3.1 release) leaves short wavelengths,
    divides those longer than original / low_freq_factor by `factor`, and interpolates between.
    """
    inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    periods = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)  # turns within the original length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((periods - low) / (high - low)).clamp(0.0, 1.0)  # 0: fully stretched, 1: left alone
    return inv_freq * (kept + (1.0 - kept) / scaling.factor)


class PositionRotaryEmbedding(torch.nn.Module):
    """Rotary angles of given positions, in the form that Megatron's layers take as `rotary_pos_emb`."""

    inv_freq: Tensor

    def __init__(self, dim: int, *, base: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(dim, base, scaling), persistent=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        """[s, 1, 1, dim] float32 angles of position_ids [s] int64."""
        angles = torch.outer(position_ids.to(self.inv_freq), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
