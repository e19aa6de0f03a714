"""Which implementation of Megatron's transformer layer a model gets: Transformer Engine's modules, or Megatron's own.

Both have the same weights and, in a dist_checkpoint, the same keys: one converted checkpoint loads into either.
The two spec functions differ between Megatron 0.16 and 0.19 in what else they take (mixture of experts, MLA, Kitchen);
the keywords used here are in all of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_star.runtime.transformer_engine import is_loaded

Implementation = Literal["transformer_engine", "local"]
"""Values of TransformerConfig.transformer_impl."""


def implementation_for(device: torch.device, dtype: torch.dtype) -> Implementation:
    """Transformer Engine where it works; its matrix products in float32 are TF32, so float32 stays with torch's."""
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "transformer_engine" if fits and is_loaded() else "local"


def gpt_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Megatron's GPT layer spec as `config.transformer_impl` asks for it.

    That field is `transformer_engine` by default also where there is none: then the layers are Megatron's own.
    """
    if config.transformer_impl == "transformer_engine" and is_loaded():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
