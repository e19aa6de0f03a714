"""transformers' Llama on the benchmark's weights."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from nemo_star.config.model import ModelConfig
from nemo_star.models.families.decoder import decoder_weights

_LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Checkpoint keys have Transformer Engine's fused norms; Megatron's local layers call them so."""


def build_llama(model: ModelConfig, weights: dict[str, Tensor]) -> PreTrainedModel:
    """transformers' model of the same shape, with a copy of `weights` (Megatron's names, tp 1, pp 1)."""
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels,
        max_position_embeddings=model.max_position_embeddings or 2**30,
        rms_norm_eps=model.layernorm_epsilon,
        tie_word_embeddings=model.share_embeddings_and_output_weights,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    some = next(iter(weights.values()))
    with some.device:
        built = AutoModelForCausalLM.from_config(config, dtype=some.dtype).eval()
    targets = built.state_dict()
    for weight in decoder_weights(model):
        for place in weight.places(model):
            whole = weights[_parameter(place.key, place.index[0] if place.index else 0, weights)]
            for name, part in zip(place.hf_names, weight.split(whole, model), strict=True):
                targets[name].copy_(part)
    return built


def _parameter(key: str, layer: int, weights: dict[str, Tensor]) -> str:
    """The parameter that a checkpoint key stands for in one layer."""
    inner = key.removeprefix("decoder.layers.")
    if inner == key:
        return key
    name = f"decoder.layers.{layer}.{inner}"
    return name if name in weights else f"decoder.layers.{layer}.{_LOCAL_NAMES[inner]}"


class _Clock(BaseStreamer):
    """Notes when each generated token comes; the first call brings the prompt."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, value: Tensor) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def timed_generation(built: PreTrainedModel, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float], int]:
    """Greedy generation: the new tokens, when each came (perf_counter seconds), bytes of the K/V cache at the end."""
    clock = _Clock()
    input_ids = torch.tensor([prompt], device=built.device)
    result = built.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        return_dict_in_generate=True,
    )
    layers = result.past_key_values.layers
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return result.sequences[0, len(prompt) :].tolist(), clock.marks[1:], kv_bytes
