"""Model configuration -> Megatron's TransformerConfig and layer spec -> GPTModel."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from nemo_star.attention import ATTENTION, AttentionState
from nemo_star.rotary import PositionRotaryEmbedding, RopeScaling


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-like decoder, in the words of Megatron's TransformerConfig."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    share_embeddings_and_output_weights: bool = False

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_query_groups {self.num_query_groups}"
            )


def transformer_config(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> TransformerConfig:
    """Megatron's configuration for inference of `model`; nothing is initialised, a checkpoint follows."""
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,
        use_cpu_initialization=device.type == "cpu",
        cuda_graph_scope=[],
    )


def layer_spec(kind: str, state: AttentionState) -> ModuleSpec:
    """Megatron's GPT layer spec whose core attention is ours; `state` is shared by all layers built from it."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = functools.partial(ATTENTION[kind], state=state)
    return spec


class StarGPTModel(GPTModel):
    """GPTModel that takes explicit position ids and computes logits only where they are wanted."""

    def __init__(self, config: TransformerConfig, spec: ModuleSpec, model: ModelConfig, **kwargs: Any) -> None:
        super().__init__(
            config,
            spec,
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            position_embedding_type="none",  # ours is set below; the stock one wants CUDA
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            parallel_output=True,
            **kwargs,
        )
        self.position_embedding_type = "rope"
        device = next(self.parameters()).device
        self.rotary_pos_emb = PositionRotaryEmbedding(
            model.kv_channels, base=model.rotary_base, scaling=model.rope_scaling, device=device
        )
        self._logits_wanted = True

    def encode(self, input_ids: Tensor, position_ids: Tensor) -> None:
        """Run the layers for what they leave in the K/V cache; the head is not computed. ids and positions [b, s]."""
        self._run(input_ids, position_ids, logits_wanted=False)

    def next_token_logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [b, vocab] float32 of the token after the last of input_ids [b, s] at position_ids [b, s]."""
        return self._run(input_ids, position_ids, logits_wanted=True)

    def _run(self, input_ids: Tensor, position_ids: Tensor, *, logits_wanted: bool) -> Tensor:
        self._logits_wanted = logits_wanted
        self.rotary_pos_emb.set_position_ids(position_ids)
        return self(input_ids=input_ids, position_ids=position_ids, attention_mask=None)

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """hidden_states [s, b, h] -> logits [b, vocab] of the last position: those of a 128K block would be 34 GB."""
        if not self._logits_wanted:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _bias = self.output_layer(hidden_states[-1:], weight=weight)
        return logits[0].float()


def build_model(
    model: ModelConfig,
    *,
    kind: str,
    state: AttentionState,
    groups: ProcessGroupCollection,
    dtype: torch.dtype,
    device: torch.device,
) -> StarGPTModel:
    """A GPTModel of shape `model` with attention `kind`, weights not initialised, in eval mode."""
    config = transformer_config(model, dtype, device)
    return StarGPTModel(config, layer_spec(kind, state), model, pg_collection=groups).eval().requires_grad_(False)
