"""Rotary embedding by position id.

Megatron's `RotaryEmbedding` derives positions from the sequence length and slices them over cp ranks; Star Attention
needs the position of each token in flight, for instance an anchor's followed by a block's. Its Llama 3 scaling also
hard-codes the factors of one checkpoint; here they come from the model's own configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How a checkpoint stretches its rotary frequencies (names as in Hugging Face configurations)."""

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


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


class PositionRotaryEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding, indexed by the position ids that `set_position_ids` gave last."""

    def __init__(self, dim: int, *, base: float, scaling: RopeScaling | None, device: torch.device) -> None:
        torch.nn.Module.__init__(self)  # the stock constructor asks for the current CUDA device
        self.rotary_interleaved = False
        self.inv_freq = inverse_frequencies(dim, base, scaling).to(device)
        self._embedding: Tensor | None = None

    def set_position_ids(self, position_ids: Tensor) -> None:
        """Angles of the tokens in flight; position_ids [b, s] int64, the same in every row of the batch."""
        angles = torch.outer(position_ids[0].to(self.inv_freq), self.inv_freq)
        self._embedding = torch.cat((angles, angles), dim=-1)[:, None, None, :]

    def get_rotary_seq_len(self, *_: Any, **__: Any) -> int:
        assert self._embedding is not None
        return self._embedding.shape[0]

    def forward(self, max_seq_len: int, *_: Any, **__: Any) -> Tensor:
        """[s, 1, 1, dim] float32 angles of the tokens in flight."""
        assert self._embedding is not None
        assert self._embedding.shape[0] == max_seq_len
        return self._embedding
