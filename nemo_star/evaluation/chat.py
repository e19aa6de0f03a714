"""Samples in a checkpoint's chat template, as NVIDIA/RULER asks instruct models.

Source: scripts/data/template.py and prepare.py there (commit c3f5e3b): the task is the user's turn, and the answer's
first words (" The special magic number for ... is") follow the assistant's header, as they are. RULER has a list of
templates; here it is the checkpoint's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_star.evaluation.samples import Asked
from nemo_star.text.chat import split_messages
from nemo_star.text.messages import BREAKPOINT
from nemo_star.text.tokenizer import Tokenizer

_SOMETHING = "a"


def template_tokens(tokenizer: Tokenizer, variables: Mapping[str, Any] | None) -> int:
    """Tokens that the chat template puts around a prompt, with one for the prompt; RULER's count has some for it, too.

    Raises:
        ValueError: no chat template, or one that does not take a single message.
    """
    if not getattr(tokenizer.hf, "chat_template", None):
        raise ValueError("chat=true needs a chat template, and the checkpoint's tokenizer has none: leave chat out")
    message = {"role": "user", "content": _SOMETHING}
    return len(tokenizer.encode_query(tokenizer.render([message], add_generation_prompt=True, **(variables or {}))))


def in_template(
    tokenizer: Tokenizer, sample: Asked, variables: Mapping[str, Any] | None
) -> tuple[list[int], list[int]]:
    """Token ids of context and query: one after the other, those of the chat template's text and the answer's prefix.

    Raises:
        ValueError: a chat template that does not give the user's text once and unchanged.
    """
    assert isinstance(sample.query, str)
    question = sample.query.removesuffix(sample.answer_prefix)
    parts = [{"type": "text", "text": sample.context, BREAKPOINT: True}, {"type": "text", "text": question}]
    message = {"role": "user", "content": parts}
    return split_messages(tokenizer, [message], template_kwargs=variables, answer_prefix=sample.answer_prefix)
