"""What NeMo 2, Megatron-Bridge and Megatron-LM save: where its weights lie, and what its YAML files say of the model.

    NeMo 2            DIR/weights/{.metadata, metadata.json, common.pt, *.distcp}   keys with the prefix `module.`
                      DIR/context/{model.yaml, io.json, nemo_tokenizer/, pickles}
    Megatron-Bridge   DIR/{latest_checkpointed_iteration.txt, iter_0000000/}
                      iter_0000000/{.metadata, metadata.json, common.pt, *.distcp, run_config.yaml, tokenizer/, pickles}

No pickle of them is loaded: not `common.pt`, not the objects of `context/`, and `.metadata` by a list of classes.
(NeMo: nemo/lightning/ckpt_utils.py, io/mixin.py; Megatron-Bridge: training/utils/checkpoint_utils.py)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nemo_star.config.model import ModelConfig

_COMPARED = (
    "num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size layernorm_epsilon "
    "rotary_base share_embeddings_and_output_weights add_qkv_bias"
).split()
"""Fields that Megatron's TransformerConfig and ModelConfig share; null in a YAML file where they follow from others."""
_COMPARED_OF_EXPERTS = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "experts_per_token",
    "moe_ffn_hidden_size": "ffn_hidden_size",
}


@dataclass(frozen=True)
class MegatronCheckpoint:
    """A checkpoint of somebody else's, as its folders say."""

    kind: str
    """Who writes such ones: NeMo 2, Megatron-Bridge or Megatron-LM."""
    weights: Path
    """Folder of the torch_dist files."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What a YAML file says of the model, in Megatron's words; empty where there is none."""
    hf_model: str | None = None
    """Name or folder of the Hugging Face model that it was made from, where it says so."""
    tokenizer: Path | None = None


def find_megatron_checkpoint(source: Path) -> MegatronCheckpoint | None:
    """What `source` is; None: none of these.

    Raises:
        ValueError: weights in another format, a YAML file that is damaged.
    """
    if (source / "weights" / ".metadata").is_file() and not (source / "nemo_star.json").is_file():
        found = _nemo(source)
    elif (folder := _iteration(source)) is not None:
        found = _bridge(folder)
    else:
        return None
    _check_backend(found.weights)
    return found


def _nemo(source: Path) -> MegatronCheckpoint:
    context = source / "context"
    settings = _read_yaml(context / "model.yaml")
    tokenizer = _mapping(settings.get("tokenizer")).get("pretrained_model_name")
    return MegatronCheckpoint(
        kind="NeMo 2",
        weights=source / "weights",
        settings=_mapping(settings.get("config")),
        hf_model=tokenizer if isinstance(tokenizer, str) else None,
        tokenizer=_folder(context / "nemo_tokenizer", context / "tokenizer"),
    )


def _bridge(folder: Path) -> MegatronCheckpoint:
    file = folder / "run_config.yaml"
    settings = _mapping(_read_yaml(file).get("model"))
    metadata = _mapping(settings.get("metadata"))
    name = settings.get("hf_model_id") or metadata.get("hf_model_id")
    return MegatronCheckpoint(
        kind="Megatron-Bridge" if file.is_file() else "Megatron-LM",
        weights=folder,
        settings=settings,
        hf_model=name if isinstance(name, str) else None,
        tokenizer=_folder(folder / "tokenizer", folder.parent / "tokenizer"),
    )


def _iteration(source: Path) -> Path | None:
    """The folder of one iteration: `source` itself, or the one that its tracker names, or the last."""
    if (source / ".metadata").is_file():
        return source
    tracker = source / "latest_checkpointed_iteration.txt"
    named = tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else ""
    if named.isdigit() or named == "release":
        folder = source / (f"iter_{int(named):07d}" if named.isdigit() else named)
        if not (folder / ".metadata").is_file():
            raise ValueError(f"source {source}: {tracker.name} names {folder.name}, which is no torch_dist checkpoint")
        return folder
    return max((file.parent for file in source.glob("iter_*/.metadata")), default=None)


def _check_backend(weights: Path) -> None:
    """Megatron notes in metadata.json how it has stored tensors; zarr and FSDP's DTensors are others."""
    file = weights / "metadata.json"
    try:
        backend = json.loads(file.read_text(encoding="utf-8")).get("sharded_backend")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read, which says how Megatron has stored tensors: {error}") from error
    if backend != "torch_dist":
        raise ValueError(f"{file}: tensors are stored as {backend}; supported: torch_dist")


class _NoObjects(yaml.SafeLoader):
    """YAML of which tags that would make Python objects are left out."""


_NoObjects.add_multi_constructor("", lambda loader, suffix, node: None)


def _read_yaml(file: Path) -> Mapping[str, Any]:
    """Content of a YAML file; nothing of one that is not there."""
    if not file.is_file():
        return {}
    try:
        return _mapping(yaml.load(file.read_text(encoding="utf-8"), Loader=_NoObjects))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: {str(error).splitlines()[0]}") from error


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _folder(*candidates: Path) -> Path | None:
    return next((folder for folder in candidates if folder.is_dir()), None)


def check_settings(checkpoint: MegatronCheckpoint, model: ModelConfig) -> None:
    """A ValueError where the YAML file says otherwise than the Hugging Face configuration that was given for it."""
    ours = {name: getattr(model, name) for name in _COMPARED}
    if model.moe is not None:
        del ours["ffn_hidden_size"]  # of layers without experts, which few such models have
        ours |= {theirs: getattr(model.moe, name) for theirs, name in _COMPARED_OF_EXPERTS.items()}
    for name, value in ours.items():
        said = checkpoint.settings.get(name)
        if isinstance(said, int | float) and said != value:
            raise ValueError(
                f"{checkpoint.weights}: the checkpoint's {name} is {said!r}, that of the Hugging Face configuration "
                f"{value!r}: give the --hf-config of this model"
            )
