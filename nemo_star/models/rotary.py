"""Rotary embedding by position id.

Megatron's `RotaryEmbedding` derives positions from the sequence length, slices them over cp ranks and wants CUDA; Star
Attention needs the position of each token in flight, for instance an anchor's followed by a block's. Its Llama 3
scaling also hard-codes the factors of one checkpoint; here they come from the model's own configuration.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_star.config.model import ModelConfig, QueryScaling, RopeScaling


def inverse_frequencies(dim: int, base: float, scaling: RopeScaling | None, *, long: bool = False) -> Tensor:
    """[dim / 2] float32 radians per position.

    `linear` is position interpolation (arXiv 2306.15595); `llama3` (Llama 3.1 release) leaves short wavelengths,
    divides those longer than original / low_freq_factor by `factor`, and interpolates between; `yarn` (arXiv
    2309.00071, section 3.2) ramps from one to the other over the dimensions; `longrope` (arXiv 2402.13753) has a
    factor for each.

    Args:
        long: longrope's factors for contexts longer than the original length.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    inv_freq = 1.0 / (base**exponents)
    if scaling is None or scaling.rope_type == "dynamic":  # up to max_exact_positions it changes nothing
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    if scaling.rope_type == "longrope":
        return 1.0 / (torch.tensor(scaling.long_factor if long else scaling.short_factor) * base**exponents)
    kept = _yarn_ramp(dim, base, scaling) if scaling.rope_type == "yarn" else _llama3_ramp(inv_freq, scaling)
    return inv_freq * (kept + (1.0 - kept) / scaling.factor)


def _llama3_ramp(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """[dim / 2]: 0 where a frequency is stretched whole, 1 where it is left alone."""
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)  # within the original length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0.0, 1.0)


def _yarn_ramp(dim: int, base: float, scaling: RopeScaling) -> Tensor:
    """The same, linear in the dimension instead of in the turns."""

    def dimension(turns: float) -> float:
        return dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    return 1.0 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)


class PositionRotaryEmbedding(torch.nn.Module):
    """Rotary angles of given positions, in the form that Megatron's layers take as `rotary_pos_emb`, and what else of a
    query depends on its position.

    Args:
        dim: of a head, those that are rotated: the first ones.
        interleaved: neighbouring dimensions are rotated together (`TransformerConfig.rotary_interleaved`).
        query_scaling: how queries are scaled by position.
        channels: of a head, all of them, where the attention factor is in `query_scale`; None: where it is in the
            softmax scale.
    """

    inv_freq: Tensor
    long_inv_freq: Tensor
    channel_scale: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        base: float,
        scaling: RopeScaling | None = None,
        interleaved: bool = False,
        query_scaling: QueryScaling | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.query_scaling = query_scaling
        self.register_buffer("inv_freq", inverse_frequencies(dim, base, scaling), persistent=False)
        scale = None
        if channels is not None and scaling is not None and scaling.attention_factor != 1.0:
            scale = torch.ones(channels)
            scale[:dim] = scaling.attention_factor**2
        self.register_buffer("channel_scale", scale, persistent=False)
        self.short_contexts: int | None = None
        """Tokens of the longest context that takes `inv_freq`; None: all do."""
        if scaling is not None and scaling.rope_type == "longrope":
            self.short_contexts = scaling.original_max_position_embeddings
            self.register_buffer("long_inv_freq", inverse_frequencies(dim, base, scaling, long=True), persistent=False)

    def forward(self, position_ids: Tensor, context_tokens: Tensor) -> Tensor:
        """[s, 1, 1, dim] float32 angles.

        Args:
            position_ids: [s] int64.
            context_tokens: [s] or [1] int64, length of the context that a token belongs to or hangs on: longrope's
                factors follow from it, so that cached keys stay what they are while an answer grows.
        """
        angles = torch.outer(position_ids.to(self.inv_freq), self.inv_freq)
        if self.short_contexts is not None:
            long = torch.outer(position_ids.to(self.inv_freq), self.long_inv_freq)
            angles = torch.where(context_tokens[:, None] > self.short_contexts, long, angles)
        angles = angles.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((angles, angles), dim=-1)
        return angles[:, None, None, :]

    def query_scale(self, position_ids: Tensor) -> Tensor | None:
        """What rotated queries are multiplied by, beyond the softmax scale: broadcasts to [s, b, np, hn], float32;
        None: nothing.

        An attention factor multiplies the rotated dimensions of queries and keys. Where these are not all, or not those
        of all layers, its square goes into the queries alone, which gives the same scores; else into the softmax scale
        (`softmax_scale`).
        """
        scale = self.channel_scale
        if self.query_scaling is not None:
            turns = torch.floor(position_ids / self.query_scaling.original_max_position_embeddings)
            by_token = (1.0 + self.query_scaling.beta * torch.log(1.0 + turns))[:, None, None, None]
            scale = by_token if scale is None else by_token * scale
        return scale


def softmax_scale(model: ModelConfig) -> float | None:
    """What scores are multiplied by, for TransformerConfig; None: 1 / sqrt(kv_channels), without any factor."""
    factor = model.rope_scaling.attention_factor if model.rope_scaling is not None else 1.0
    if factor == 1.0 or _scales_queries(model):
        return model.softmax_scale
    return (model.softmax_scale or model.kv_channels**-0.5) * factor**2


def build_rotary(model: ModelConfig, device: torch.device) -> PositionRotaryEmbedding:
    """Rotary angles with the model's own base and scaling."""
    return PositionRotaryEmbedding(
        model.rotary_channels,
        base=model.rotary_base,
        scaling=model.rope_scaling,
        interleaved=model.rotary_interleaved,
        query_scaling=model.query_scaling,
        channels=model.kv_channels if _scales_queries(model) else None,
    ).to(device)


def build_windowed_rotary(model: ModelConfig, device: torch.device) -> PositionRotaryEmbedding | None:
    """The same for windowed layers; None where they turn as the others do."""
    if model.windowed_rotary_base is None:
        return None
    return PositionRotaryEmbedding(
        model.rotary_channels,
        base=model.windowed_rotary_base,
        interleaved=model.rotary_interleaved,
        query_scaling=model.query_scaling,
    ).to(device)


def _scales_queries(model: ModelConfig) -> bool:
    """Whether an attention factor multiplies some dimensions of a head only, or some layers."""
    return model.rotary_channels < model.kv_channels or model.windowed_rotary_base is not None
