"""What a model family is: a Hugging Face configuration read into the model's shape, and a mapping table of its weights.

A configuration is read strictly. A key that changes the mathematics and is not implemented is refused by name, and so
is one that nobody here knows: it may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_star.config.model import ModelConfig
from nemo_star.config.strict import parse
from nemo_star.models.families.rope import ROPE_KEYS, group, read_rope
from nemo_star.models.families.weights import Weight

Values = Mapping[str, Any]
"""Of a config.json, those that are null left out."""

_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
}
"""Keys that every config.json has, and their names here."""
_READ = {"num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"}
_NO_MATHEMATICS = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache initializer_range bos_token_id "
    "eos_token_id pad_token_id sep_token_id decoder_start_token_id attention_dropout resid_pdrop embd_pdrop "
    "hidden_dropout auto_map pretraining_tp return_dict output_attentions output_hidden_states id2label label2id "
    "problem_type chunk_size_feed_forward is_encoder_decoder is_decoder torchscript use_bfloat16 tokenizer_class "
    "finetuning_task task_specific_params attn_implementation rope_theta partial_rotary_factor "
    "original_max_position_embeddings quantization_config max_length min_length do_sample temperature top_k top_p "
    "num_beams repetition_penalty max_sequence_length unsloth_fixed unsloth_version".split()
)
"""Keys of config.json that change nothing in what a model computes (some are for sampling or training), or are read
with others (rotary), or before (quantization)."""


def no_further(values: Values) -> dict[str, Any]:
    """Settings of a family that is as Llama is, but for its names and what it requires."""
    return {}


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face, in its file of this folder as `FAMILY`."""

    architecture: str
    """Name of the model class, e.g. LlamaForCausalLM."""
    weights: Callable[[ModelConfig], tuple[Weight, ...]]
    """The mapping table for a model of this shape."""
    settings: Callable[[Values], dict[str, Any]] = no_further
    """Fields of ModelConfig beyond those that all families have."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a config.json without a key means, where transformers' class of this family says otherwise than Llama's."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Key -> values that are implemented; a missing key or null means the first of them."""
    rope: Callable[[Values], Mapping[str, Any]] = group
    """The rotary keys of the layers that see everything."""
    rotates_part: bool = False
    """Whether `partial_rotary_factor` may leave dimensions of a head unrotated."""
    read: frozenset[str] = frozenset()
    """Further keys that `settings` reads, or that change nothing in this family."""

    ignores: Callable[[str, ModelConfig], bool] = lambda name, model: False
    """Tensors of Hugging Face's that this model does not run, by name."""

    def model_config(self, values: Mapping[str, Any]) -> ModelConfig:
        """Model shape from the values of a config.json. transformers is not asked: importing it takes seconds.

        Raises:
            ValueError: a size that is missing or no number, a setting that is not implemented or not known.
        """
        values = self._with_defaults(values)
        self._check(values)
        shape: dict[str, Any] = {ours: values[theirs] for theirs, ours in _SIZES.items()}
        shape |= {
            "num_query_groups": values.get("num_key_value_heads") or values["num_attention_heads"],
            "kv_channels": values.get("head_dim", 0),
            "max_position_embeddings": values.get("max_position_embeddings", 2048),
            "layernorm_epsilon": values.get("rms_norm_eps", 1e-6),
            "share_embeddings_and_output_weights": values.get("tie_word_embeddings", False),
        }
        shape |= read_rope(values, self.rope(values))
        if shape["rotary_percent"] != 1.0 and not self.rotates_part:
            raise ValueError(
                f"config.json: partial_rotary_factor={shape['rotary_percent']!r} is not supported for "
                f"{self.architecture}"
            )
        shape |= self.settings(values)
        try:
            return parse(ModelConfig, shape)
        except ValueError as error:
            raise ValueError(f"config.json: {error}") from error

    def is_ignored(self, hf_name: str, model: ModelConfig) -> bool:
        """Tensors that old checkpoints carry beside the weights: rotary buffers, a copy of tied embeddings."""
        tied = model.share_embeddings_and_output_weights and hf_name == "lm_head.weight"
        return tied or hf_name.endswith("rotary_emb.inv_freq") or self.ignores(hf_name, model)

    def _with_defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Null means the default, as a missing key does; but of a window, that there is none."""
        given = {name: value for name, value in values.items() if value is not None}
        without = {"sliding_window"} & (values.keys() - given.keys())
        return {**{name: value for name, value in self.defaults.items() if name not in without}, **given}

    def _check(self, values: Values) -> None:
        for name, supported in {"hidden_act": ("silu",), **self.required}.items():
            if values.get(name, supported[0]) not in supported:
                words = " or ".join(map(repr, supported))
                raise ValueError(f"config.json: {name}={values[name]!r} is not supported, only {words}")
        missing = [name for name in _SIZES if name not in values]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        for name in _SIZES:
            if type(values[name]) is not int:
                raise ValueError(f"config.json: {name}={values[name]!r} must be of type int")
        known = {*_SIZES, *_READ, *_NO_MATHEMATICS, *ROPE_KEYS, *self.required, *self.read, "hidden_act"}
        unknown = sorted(
            name
            for name, value in values.items()
            if name not in known and not name.startswith("_") and value not in (False, [], {})
        )
        if unknown:
            listed = ", ".join(f"{name}={values[name]!r}" for name in unknown)
            raise ValueError(
                f"config.json: {listed}: not known for {self.architecture}, and may change what the model computes. "
                "If it does not, take it out of config.json"
            )
