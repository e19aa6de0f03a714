"""Model configuration -> Megatron's TransformerConfig and layer spec -> GPTModel."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import LayerNormImpl, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch.nn import functional as F

from nemo_star.attention.socket import attention_class
from nemo_star.attention.step import AttentionState
from nemo_star.config.model import ModelConfig
from nemo_star.methods.partition import shares
from nemo_star.models.guard import check_core_attention, uses_windows
from nemo_star.models.layer_spec import adapt, gpt_layer_spec, implementation_for, with_experts
from nemo_star.models.moe import MoE
from nemo_star.models.norms import ZeroCenteredRMSNorm
from nemo_star.models.rotary import softmax_scale
from nemo_star.parallel.experts import ExpertLayout
from nemo_star.parallel.groups import Groups

_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


class StageLayout(PipelineParallelLayerLayout):
    """Layers per pipeline stage, the first stages one more; for one stage, given its rank.

    The stock class asks Megatron's global parallel state for the rank, which stays untouched here.
    """

    def __init__(self, num_layers: int, pp_group: dist.ProcessGroup) -> None:
        stages = pp_group.size()
        share, extra = divmod(num_layers, stages)
        layout = [["decoder"] * (share + (stage < extra)) for stage in range(stages)]
        layout[0].insert(0, "embedding")
        layout[-1].append("loss")
        super().__init__(layout, stages)
        self._pp_rank = pp_group.rank()

    def get_num_layers_to_build(self, layer_type: Any = LayerType.decoder, *_: Any, **__: Any) -> int:
        return super().get_num_layers_to_build(layer_type, pp_rank=self._pp_rank)

    def get_layer_offset(self, layer_type: Any = LayerType.decoder, *_: Any, **__: Any) -> int:
        return super().get_layer_offset(layer_type, pp_rank=self._pp_rank)


def transformer_config(
    model: ModelConfig, groups: ProcessGroupCollection, dtype: torch.dtype, device: torch.device
) -> TransformerConfig:
    """Megatron's configuration for inference of `model`; nothing is initialised, a checkpoint follows."""
    stages = groups.pp.size()
    implementation = implementation_for(device, dtype)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.layernorm_epsilon,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=model.zero_centered_norms and implementation == "transformer_engine",
        qk_layernorm=model.qk_norm != "none",  # else Megatron 0.19 refuses a spec with such norms
        softmax_scale=softmax_scale(model),
        softmax_type="learnable" if model.attention_sinks else "vanilla",
        # Megatron counts the tokens before and after a token's own, and marks windowed layers by 1.
        window_size=None if model.window_size is None else (model.window_size - 1, 0),
        window_attn_skip_freq=[int(layer in model.windowed_layers) for layer in range(model.num_layers)],
        rotary_interleaved=model.rotary_interleaved,
        gated_linear_unit=True,
        activation_func=_ACTIVATIONS[model.activation],
        add_bias_linear=model.add_mlp_bias,
        add_qkv_bias=model.add_qkv_bias,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        # Its kernel takes [s, 1, 1, dim] angles as given; rotating neighbours is not in all of its releases.
        apply_rope_fusion=implementation == "transformer_engine" and not model.rotary_interleaved,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=groups.tp.size(),
        pipeline_model_parallel_size=stages,
        pipeline_model_parallel_layout=StageLayout(model.num_layers, groups.pp) if stages > 1 else None,
        perform_initialization=False,
        use_cpu_initialization=device.type == "cpu",
        cuda_graph_scope=[],
        transformer_impl=implementation,
    )


def star_layer_spec(config: TransformerConfig, state: AttentionState) -> ModuleSpec:
    """Megatron's GPT layer spec whose core attention is ours, for any GPTModel.

    Args:
        config: of the model that will be built from the spec.
        state: shared by all layers built from the spec, steered by the engine.

    Raises:
        ValueError: `config` asks core attention for what ours does not do (guard.py).
    """
    check_core_attention(config)
    if uses_windows(config):
        state.method = state.method.with_windows()
    spec = gpt_layer_spec(config)
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = functools.partial(attention_class(state.method), state=state)
    return spec


class StageGPTModel(GPTModel):
    """A GPTModel for inference on one pipeline stage, without Megatron's global parallel state."""

    def setup_embeddings_and_output_layer(self) -> None:
        """Nothing to set up: the stock method prepares tied weights of several stages for training, on CUDA."""

    def tie_embeddings_and_output_weights_state_dict(
        self, sharded_state_dict: dict[str, Any], output_layer_weight_key: str, first_stage_word_emb_key: str, *_: Any
    ) -> None:
        """The last stage's head is read from the embedding; the stock method asks the global parallel state."""
        if self.post_process and not self.pre_process:
            sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
                tensor=self.output_layer.weight,
                key=first_stage_word_emb_key,
                allow_shape_mismatch=True,
                tp_group=self.tp_group,
                dp_cp_group=self.pg_collection.dp_cp,
            )


def _layer_specs(
    config: TransformerConfig, model: ModelConfig, state: AttentionState, groups: Groups
) -> TransformerBlockSubmodules:
    """A spec for each layer of this rank's stage."""
    place = ExpertLayout(groups.layout, tp_rank=groups.tp.rank(), cp_rank=groups.cp.rank())
    specs = []
    for layer in range(*shares(model.num_layers, groups.pp.size())[groups.pp.rank()]):
        spec = star_layer_spec(config, state)
        adapt(spec, model, config, groups.tp)
        if model.moe is not None and layer not in model.moe.dense_layers:
            with_experts(spec, MoE.bound(model.moe, groups.collection, state, place))
        specs.append(spec)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=LayerNormImpl)


def build_model(
    model: ModelConfig,
    *,
    state: AttentionState,
    groups: Groups,
    dtype: torch.dtype,
    device: torch.device,
) -> GPTModel:
    """This rank's part of a GPTModel of shape `model`, weights not initialised, in eval mode."""
    config = transformer_config(model, groups.collection, dtype, device)
    tp, pp_rank = groups.tp.size(), groups.pp.rank()
    built = StageGPTModel(
        config,
        _layer_specs(config, model, state, groups),
        vocab_size=-(-model.vocab_size // tp) * tp,  # padded: each tp rank holds as many rows
        max_sequence_length=model.max_position_embeddings or 1,  # of position embeddings, which there are none of
        pre_process=pp_rank == 0,
        post_process=pp_rank == groups.pp.size() - 1,
        position_embedding_type="none",  # the engine gives the layers their angles; the stock module wants CUDA
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        parallel_output=True,
        pg_collection=groups.collection,
    )
    if model.zero_centered_norms and config.transformer_impl == "local" and built.post_process:
        built.decoder.final_layernorm = ZeroCenteredRMSNorm(config, config.hidden_size, config.layernorm_epsilon)
    if model.embedding_scale != 1.0 and built.pre_process:
        scale = torch.tensor(model.embedding_scale, dtype=dtype, device=device)  # rounded as the weights are
        built.embedding.register_forward_hook(lambda module, arguments, embedded: embedded * scale)
    # Megatron's own norms come in float32 whatever `params_dtype` says: slower, and a stage takes its type from them.
    return built.to(device=device, dtype=dtype).eval().requires_grad_(False)
