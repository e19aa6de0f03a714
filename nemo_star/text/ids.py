"""Checks of what users give: text, or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_star.text.tokenizer import Tokenizer

Text = str | Sequence[int]
"""Text, or token ids."""


def check_text(name: str, text: Any, tokenizer: Tokenizer | None) -> None:
    """Raises ValueError for what cannot be tokenized; `name` is what the text is to the user."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, not {type(text).__name__}")
    if text == "":
        raise ValueError(f"the {name} is empty")
    if not is_unicode(text):
        raise ValueError(f"the {name} holds half of a surrogate pair: not valid Unicode text")
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer: give token ids (context_ids, query_ids) instead of text")


def check_ids(name: str, ids: Any, vocab_size: int) -> None:
    """Raises ValueError for what are no token ids of the model."""
    if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(f"{name}_ids must be a list of integers")
    if not ids:
        raise ValueError(f"the {name} is empty")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} holds token id {wrong}, outside the vocabulary of {vocab_size} tokens")


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
