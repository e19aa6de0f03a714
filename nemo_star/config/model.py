"""Shape of a model. Needs neither torch nor weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

MLP_CHUNK_TOKENS = 4096
"""Tokens that go through an MLP at once; its intermediate result is several times as large as the hidden states."""


@dataclass(frozen=True)
class RopeScaling:
    """How a checkpoint stretches its rotary frequencies (names as in Hugging Face configurations)."""

    rope_type: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    """Linear: all frequencies divided by `factor`; llama3: only low ones, with a smooth passage to the high ones; yarn:
    the same by turns, with a ramp; longrope: each by its own factor, of two sets; dynamic: a base that grows with the
    length past max_position_embeddings, which is refused: cached keys would all change."""
    factor: float = 1.0
    """What frequencies are divided by."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are stretched whole."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor stay."""
    original_max_position_embeddings: int = 8192
    """Positions that the model was trained for before it was stretched; longrope: the longest context that takes the
    short factors."""
    beta_fast: float = 32.0
    """yarn: frequencies of more turns than these in the original length stay."""
    beta_slow: float = 1.0
    """yarn: frequencies of fewer turns than these are stretched whole."""
    truncate: bool = True
    """yarn: whether the ends of the ramp are rounded to whole dimensions."""
    attention_factor: float = 1.0
    """yarn, longrope: what queries and keys are multiplied by after rotation."""
    short_factor: tuple[float, ...] = ()
    """longrope: by dimension, for contexts up to the original length."""
    long_factor: tuple[float, ...] = ()
    """longrope: by dimension, for longer contexts."""


@dataclass(frozen=True)
class QueryScaling:
    """Queries multiplied by 1 + beta * ln(1 + floor(position / original)), as Ministral 3 and Llama 4 have it."""

    beta: float
    """0: no scaling."""
    original_max_position_embeddings: int
    """Positions below are not scaled."""


@dataclass(frozen=True)
class ClampedGate:
    """Experts' channels as gpt-oss has them: min(gate, limit) * sigmoid(alpha * min(gate, limit)) times up + 1, up kept
    within -limit and limit."""

    limit: float
    """Gates are cut off above it, up values above it and below its negative."""
    alpha: float
    """What a gate is multiplied by inside the sigmoid."""


@dataclass(frozen=True)
class MoEConfig:
    """Layers whose FFN is a mixture of experts."""

    num_experts: int
    """Routed experts of a layer."""
    experts_per_token: int
    """That a token goes through (top k)."""
    ffn_hidden_size: int
    """Width inside one expert."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """Of the router's logits."""
    normalizes: bool = True
    """Whether the weights of a token's experts sum to one."""
    scaling_factor: float = 1.0
    """What these weights are multiplied by."""
    num_groups: int = 1
    """Groups of experts."""
    groups_per_token: int = 1
    """Groups that a token's experts come from."""
    correction_bias: bool = False
    """Whether a bias of each expert takes part in the choice, not in the weights."""
    shared_ffn_hidden_size: int = 0
    """Width inside the expert that every token goes through; 0: there is none."""
    router_bias: bool = False
    """Bias of the router's logits."""
    add_expert_bias: bool = False
    """Biases inside the routed experts."""
    clamped_gate: ClampedGate | None = None
    """How gate and up make an expert's channels; None: activation(gate) * up."""
    dense_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that have an FFN of `ffn_hidden_size` instead."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, in the words of Megatron's TransformerConfig where it has them: of a checkpoint, of random
    weights that are measured, of what is planned. What is left out is as in Llama."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the hidden states."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """KV heads."""
    ffn_hidden_size: int
    """Width inside the gated FFN."""
    vocab_size: int
    """Tokens of the vocabulary."""
    kv_channels: int = 0
    """Dimension of a head; 0: hidden_size / num_attention_heads."""
    max_position_embeddings: int | None = None
    """Positions that the model was trained for; None: no limit (random weights)."""
    layernorm_epsilon: float = 1e-5
    """Added to the variance in RMSNorm."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies (rope_theta)."""
    rope_scaling: RopeScaling | None = None
    """How the rotary frequencies are stretched; None: not at all."""
    share_embeddings_and_output_weights: bool = False
    """Whether the head's matrix is the embedding's (tied)."""
    add_qkv_bias: bool = False
    """Biases of queries, keys and values."""
    add_projection_bias: bool = False
    """Bias of attention's output projection."""
    add_mlp_bias: bool = False
    """Biases of the FFN."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """RMSNorm of queries and keys before rotation: of each head, or over all heads at once."""
    norms: Literal["pre", "post", "both"] = "pre"
    """Norms of a layer: before attention and FFN, of their outputs, or both."""
    zero_centered_norms: bool = False
    """Whether norms multiply by 1 + weight."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Of the FFN's gate."""
    softmax_scale: float | None = None
    """What scores are multiplied by; None: 1 / sqrt(kv_channels)."""
    rotary_percent: float = 1.0
    """Share of a head's dimensions that is rotated, the first ones."""
    rotary_interleaved: bool = False
    """Whether neighbouring dimensions are rotated together, instead of one of each half."""
    query_scaling: QueryScaling | None = None
    """How queries are scaled by position; None: not at all."""
    embedding_scale: float = 1.0
    """What embeddings are multiplied by."""
    window_size: int | None = None
    """Tokens that a token of a windowed layer sees: itself and those right before it; None: no layer is windowed."""
    windowed_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that are windowed."""
    windowed_rotary_base: float | None = None
    """Base of the rotary frequencies of windowed layers, which are not stretched; None: as those of the others."""
    attention_sinks: bool = False
    """Whether each head has a sink: a learned score that takes part in the softmax and adds nothing to the result."""
    moe: MoEConfig | None = None
    """Mixture of experts; None: every layer has one FFN."""
    max_exact_positions: int | None = None
    """Positions from which on this model computes otherwise than is implemented: longer requests are refused."""

    def __post_init__(self) -> None:
        if self.kv_channels == 0 and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}: give kv_channels, the dimension of a head"
                )
            object.__setattr__(self, "kv_channels", self.hidden_size // self.num_attention_heads)
        for name, value in asdict(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"a model with {name} {value}: must be at least 1")
        if self.moe is not None and self.moe.experts_per_token > self.moe.num_experts:
            raise ValueError(
                f"moe.experts_per_token {self.moe.experts_per_token} of moe.num_experts {self.moe.num_experts}"
            )
        if bool(self.windowed_layers) != (self.window_size is not None):
            raise ValueError(f"window_size {self.window_size} and windowed_layers {self.windowed_layers} go together")
        if self.windowed_layers and not set(self.windowed_layers) <= set(range(self.num_layers)):
            raise ValueError(f"windowed_layers {self.windowed_layers} of a model with {self.num_layers} layers")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_query_groups {self.num_query_groups}"
            )

    @property
    def needs_windows(self) -> bool:
        """Whether attention has to be more than causal: windowed layers, or sinks."""
        return self.window_size is not None or self.attention_sinks

    def window_of(self, layer: int) -> int | None:
        """Window of a layer, counted from 0; None: it sees everything."""
        return self.window_size if layer in self.windowed_layers else None

    @property
    def rotary_channels(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.kv_channels * self.rotary_percent)

    @property
    def query_width(self) -> int:
        """np * hn: elements of one token's queries."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        """ng * hn: elements of one token's keys, or values."""
        return self.num_query_groups * self.kv_channels

    @property
    def layer_matrices(self) -> dict[str, int]:
        """Elements of one layer's matrices that a token goes through, by what they do."""
        return {
            "qkv": self.hidden_size * (self.query_width + 2 * self.kv_width),
            "projection": self.query_width * self.hidden_size,
            "ffn": self._ffn_elements(),
        }

    @property
    def ffn_channels(self) -> int:
        """Channels inside the FFN, or the experts, that a token goes through."""
        if self.moe is None:
            return self.ffn_hidden_size
        return self.moe.experts_per_token * self.moe.ffn_hidden_size + self.moe.shared_ffn_hidden_size

    @property
    def layers_differ(self) -> bool:
        """Whether layers have different weights: some experts, others not."""
        return self.moe is not None and bool(self.moe.dense_layers)

    def _ffn_elements(self) -> int:
        """Of the FFN, or of a token's experts; a mean, where some layers have experts and others not."""
        if self.moe is None:
            return 3 * self.hidden_size * self.ffn_hidden_size
        width = self.moe.experts_per_token * self.moe.ffn_hidden_size + self.moe.shared_ffn_hidden_size
        mixture = 3 * self.hidden_size * width + self.hidden_size * self.moe.num_experts
        dense = len(self.moe.dense_layers)
        total = (self.num_layers - dense) * mixture + dense * 3 * self.hidden_size * self.ffn_hidden_size
        return total // self.num_layers

    @property
    def pair_flops(self) -> int:
        """Operations of one (query, key) pair in one layer: the score, and the weighted value."""
        return 4 * self.query_width
