"""What a checkpoint is, in lines for a person: its files, headers and descriptions, no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from nemo_star.checkpoint.description import DESCRIPTION_FILE, HF_FOLDER, WEIGHTS_FOLDER, read_description
from nemo_star.checkpoint.megatron import MegatronCheckpoint, find_megatron_checkpoint
from nemo_star.config.model import ModelConfig


def inspect_checkpoint(source: Path) -> Iterator[str]:
    """Lines about a converted checkpoint, a Hugging Face directory, or one of NeMo 2, Megatron-Bridge or Megatron-LM.

    Raises:
        ValueError: none of these, or one that is damaged. Why a Hugging Face one cannot be converted is in a line.
    """
    if not source.is_dir():
        raise ValueError(f"source {source} does not exist or is not a directory")
    if (source / DESCRIPTION_FILE).is_file():
        return _converted(source)
    if (found := find_megatron_checkpoint(source)) is not None:
        return _megatron(found)
    if (source / "config.json").is_file():
        return _hugging_face(source)
    raise ValueError(
        f"source {source} is no checkpoint that is known here: no {DESCRIPTION_FILE}, no config.json, no .metadata in "
        "it, in weights/ or in iter_*/"
    )


def _converted(source: Path) -> Iterator[str]:
    description = read_description(source)
    files = [source / WEIGHTS_FOLDER / name for name in description.weight_files]
    yield f"kind          converted checkpoint, format version {description.format_version}"
    yield from _model(description.architecture, description.model)
    yield f"weights       {_size(description.weight_files.values())} in {len(files)} files, mostly {description.dtype}"
    if links := [file for file in files if file.is_symlink()]:
        yield f"links         {len(links)} files lie in {links[0].resolve().parent}"
    yield f"checksums     {'SHA-256 of each file' if description.sha256 else 'none (format version 1)'}"
    yield from _companions(source / HF_FOLDER)


def _hugging_face(source: Path) -> Iterator[str]:
    from nemo_star.checkpoint.hf import HFReader
    from nemo_star.checkpoint.importing import plan_import

    reader = HFReader(source)
    names = list(reader.names())
    types = Counter(reader.stored_type(name) for name in names)
    files = {reader.file_of(name) for name in names}
    yield "kind          Hugging Face checkpoint, safetensors"
    yield f"architecture  {reader.architecture}"
    yield f"weights       {_size((source / file).stat().st_size for file in files)} in {len(files)} files"
    yield f"tensors       {', '.join(f'{count} {dtype}' for dtype, count in types.most_common())}"
    if settings := reader.values.get("quantization_config"):
        yield f"quantized     {settings.get('quant_method')}"
    try:
        plan = plan_import(source)
    except ValueError as error:
        yield f"import        not possible: {error}"
    else:
        yield from _model(plan.reader.architecture, plan.model)
        yield f"import        {_size(chunk.size for chunk in plan.chunks)}, mostly {plan.dtype}"
    yield from _companions(source)


def _megatron(found: MegatronCheckpoint) -> Iterator[str]:
    from nemo_star.checkpoint.metadata import read_metadata

    tensors = read_metadata(found.weights)
    training = [key for key in tensors if key.startswith(("optimizer", "chained_"))]
    mine = {key: tensor for key, tensor in tensors.items() if key not in training and "_extra_state" not in key}
    files = {chunk.file for tensor in mine.values() for chunk in tensor.chunks}
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in mine.values())
    yield f"kind          {found.kind}, torch_dist in {found.weights}"
    for name in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if name in found.settings:
            yield f"{name:<13} {found.settings[name]}"
    yield f"weights       {_size((found.weights / file).stat().st_size for file in files)} in {len(files)} files"
    yield f"tensors       {', '.join(f'{count} {dtype}' for dtype, count in types.most_common())}"
    yield f"keys          {', '.join(sorted(mine)[:3])}, ..."
    yield f"training      {len(training)} tensors of the optimizer, which are not imported"
    yield f"made from     {found.hf_model or 'not said'}: import wants --hf-config with its config.json"
    if found.tokenizer is not None:
        yield from _companions(found.tokenizer)


def _model(architecture: str, model: ModelConfig) -> Iterator[str]:
    yield f"architecture  {architecture}"
    yield (
        f"model         {model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads, "
        f"{model.num_query_groups} KV heads of {model.kv_channels}, FFN {model.ffn_hidden_size}, "
        f"vocabulary {model.vocab_size}"
    )
    if model.moe is not None:
        yield (
            f"experts       {model.moe.num_experts}, {model.moe.experts_per_token} a token, of width "
            f"{model.moe.ffn_hidden_size}"
        )
    yield f"positions     {model.max_position_embeddings or 'no limit'}"


def _companions(folder: Path) -> Iterator[str]:
    names = sorted(file.name for file in folder.iterdir() if file.name.startswith(("tokenizer", "vocab", "chat_")))
    yield f"tokenizer     {', '.join(names) or 'none: it takes token ids'}"


def _size(sizes: Iterable[int]) -> str:
    total = sum(sizes)
    return f"{total / 1e9:.2f} GB" if total >= 10**8 else f"{total / 1e6:.2f} MB"
