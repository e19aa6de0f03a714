"""Answers in the shapes of OpenAI's API: whole, and as chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol
from uuid import uuid4

from nemo_star.engine.sampling import TokenLogprobs
from nemo_star.server.prompts import Prompt

TokenText = Callable[[int], str]
Logprobs = list[TokenLogprobs] | None
Choice = tuple[str, Logprobs, str]
"""Text, log-probabilities, reason of the end."""


class Reply(Protocol):
    """One kind of completion."""

    def head(self, index: int) -> dict[str, Any] | None:
        """The chunk that begins a choice, where the kind has one."""

    def chunk(self, index: int, text: str, logprobs: Logprobs, reason: str | None) -> dict[str, Any]:
        """A piece of a choice."""

    def whole(self, choices: list[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """All choices."""

    def bare(self, **values: Any) -> dict[str, Any]:
        """A chunk without choices."""


class _Common:
    object: str
    prefix: str

    def __init__(self, model: str, token_text: TokenText) -> None:
        self._id = f"{self.prefix}-{uuid4().hex}"
        self._model = model
        self._created = int(time.time())
        self._token_text = token_text

    def bare(self, **values: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self.object,
            "created": self._created,
            "model": self._model,
            "choices": [],
            **values,
        }


class ChatReply(_Common):
    """`chat.completion`."""

    object = "chat.completion.chunk"
    prefix = "chatcmpl"

    def head(self, index: int) -> dict[str, Any] | None:
        return self._with({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def chunk(self, index: int, text: str, logprobs: Logprobs, reason: str | None) -> dict[str, Any]:
        delta = {} if reason is not None and not text else {"content": text}
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": self._logprobs(logprobs)}
        return self._with(choice)

    def whole(self, choices: list[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        told = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "finish_reason": reason,
                "logprobs": self._logprobs(logprobs),
            }
            for index, (text, logprobs, reason) in enumerate(choices)
        ]
        return {**self.bare(), "object": "chat.completion", "choices": told, **usage}

    def _with(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self.bare(choices=[choice])

    def _logprobs(self, logprobs: Logprobs) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        content = [
            {**self._one(each.token, each.logprob), "top_logprobs": [self._one(*likely) for likely in each.top]}
            for each in logprobs
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


class TextReply(_Common):
    """`text_completion`."""

    object = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, token_text: TokenText) -> None:
        super().__init__(model, token_text)
        self._offsets: dict[int, int] = {}

    def head(self, index: int) -> dict[str, Any] | None:
        return None

    def chunk(self, index: int, text: str, logprobs: Logprobs, reason: str | None) -> dict[str, Any]:
        return self.bare(choices=[self._choice(index, text, logprobs, reason)])

    def whole(self, choices: list[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        told = [self._choice(index, *choice) for index, choice in enumerate(choices)]
        return self.bare(choices=told, **usage)

    def _choice(self, index: int, text: str, logprobs: Logprobs, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": self._logprobs(index, logprobs)}

    def _logprobs(self, index: int, logprobs: Logprobs) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        tokens, offsets, tops = [], [], []
        for each in logprobs:
            tokens.append(self._token_text(each.token))
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(tokens[-1])
            first = each.logprob != each.logprob  # nan: nothing is before the first token of a prompt
            # Of tokens that read alike, the likelier one counts.
            likely: dict[str, float] = {}
            for token, logprob in each.top:
                likely.setdefault(self._token_text(token), logprob)
            tops.append(None if first else likely)
        values = [None if each.logprob != each.logprob else each.logprob for each in logprobs]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def usage(prompts: list[Prompt], generated: int, cached: int) -> dict[str, Any]:
    """Tokens, as clients count them."""
    prompt_tokens = sum(prompt.tokens for prompt in prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
