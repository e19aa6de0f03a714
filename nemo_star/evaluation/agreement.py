"""A converted checkpoint beside transformers: logits of both on the same random ids."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_star.checkpoint.description import read_description
from nemo_star.config.model import ModelConfig
from nemo_star.llm.front import LLM
from nemo_star.models.families import families
from nemo_star.runtime.memory import free_memory

QUERY_TOKENS = 8


@dataclass(frozen=True)
class Agreement:
    """What two programs make of the same ids."""

    difference: float
    """The largest one of two logits."""
    greedy: int
    """Steps at which both would take the same token."""
    steps: int


def compare_with_transformers(source: Path, checkpoint: Path, *, tokens: int, steps: int, seed: int) -> Agreement:
    """Logits after each of the last `steps` ids of `tokens` random ones, in float32 on CPU, one model after the other.

    Args:
        source: Hugging Face directory, for transformers.
        checkpoint: what was converted from it.

    Raises:
        ValueError: too few ids; less free memory than one of the models takes.
    """
    if not 0 < steps < tokens - QUERY_TOKENS:
        raise ValueError(f"{steps} steps of {tokens} ids: give at least {steps + QUERY_TOKENS + 1} ids")
    model = read_description(checkpoint).model
    _check_memory(checkpoint, model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.vocab_size, (tokens,), generator=generator)
    expected = _theirs(source, ids)[-steps - 1 : -1]
    gc.collect()
    found = _ours(checkpoint, ids.tolist(), steps)
    same = int((found.argmax(-1) == expected.argmax(-1)).sum())
    return Agreement(float((found - expected).abs().max()), same, steps)


def _check_memory(checkpoint: Path, model: ModelConfig) -> None:
    """Each model is in memory alone, in float32."""
    table = families()[read_description(checkpoint).architecture].weights(model)
    elements = sum(torch.Size(weight.shape(model)).numel() for weight in table for _ in weight.places(model))
    needed, free = 4 * elements, free_memory(torch.device("cpu")).size
    if 1.2 * needed > free:
        raise ValueError(
            f"the model takes {needed / 1e9:.1f} GB in float32, in transformers and here in turn, and "
            f"{free / 1e9:.1f} GB of memory are free: check it on a larger machine"
        )


def _theirs(source: Path, ids: Tensor) -> Tensor:
    """[ids, vocab] float32."""
    import transformers  # takes seconds

    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    except (ImportError, ValueError) as error:
        raise ValueError(f"transformers does not load {source}: {str(error).splitlines()[0]}") from error
    with torch.no_grad():
        logits: Tensor = model.eval()(ids[None]).logits[0].float()
    return logits


def _ours(checkpoint: Path, ids: list[int], steps: int) -> Tensor:
    """[steps, vocab] float32: after each id that stands before one of the last `steps`."""
    with LLM(checkpoint, dtype="float32", attention={"kind": "dense"}) as llm:
        prompt, forced = ids[:-steps], iter(ids[-steps:])
        context = llm.engine.encode(prompt[:-QUERY_TOKENS])
        answered = llm.engine.generate(
            context, prompt[-QUERY_TOKENS:], max_tokens=steps, choose=lambda logits: (next(forced), False)
        )
        return torch.stack([step.logits for step in answered if step.logits is not None]).float()
