"""The language model inside a checkpoint that also sees: Mistral Small 3.1 and later, Ministral 3, and Gemma 3 from 4B
on come as one.

Its tensors are read under the names that they have in a checkpoint of the language model alone; the others stay behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nemo_star.checkpoint.hf import Source

_ARCHITECTURES = {
    "Gemma3ForConditionalGeneration": {"gemma3_text": "Gemma3ForCausalLM"},
    "Mistral3ForConditionalGeneration": {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
}
"""Of the whole -> model type of the language model -> its architecture."""
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
"""In checkpoints of transformers before 5 and since -> alone."""
_OTHERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
"""What stays behind."""


class LanguagePart:
    """The same `Source`, of the language model alone."""

    def __init__(self, whole: Source) -> None:
        self.directory = whole.directory
        self._whole = whole
        self._names = {_alone(name): name for name in whole.names() if not name.startswith(_OTHERS)}
        text: dict[str, Any] = dict(whole.values["text_config"])
        if "tie_word_embeddings" in whole.values:  # the head is the whole model's
            text["tie_word_embeddings"] = whole.values["tie_word_embeddings"]
        self.architecture = _ARCHITECTURES[whole.architecture][text.get("model_type", "")]
        self.values = {**text, "architectures": [self.architecture]}
        if dtype := whole.values.get("dtype") or whole.values.get("torch_dtype"):
            self.values["dtype"] = dtype

    def names(self) -> Iterable[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._whole.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._whole.dtype(self._names[name])

    def get(self, name: str) -> Tensor:
        return self._whole.get(self._names[name])

    def file_of(self, name: str) -> str:
        return self._whole.file_of(self._names[name])


def language_part(reader: Source) -> Source:
    """The language model of a checkpoint that is known to have one inside; any other checkpoint as it is."""
    text = reader.values.get("text_config")
    known = _ARCHITECTURES.get(reader.architecture, {})
    return LanguagePart(reader) if isinstance(text, dict) and text.get("model_type") in known else reader


def _alone(name: str) -> str:
    for prefix, alone in _PREFIXES.items():
        if name.startswith(prefix):
            return alone + name.removeprefix(prefix)
    return name
