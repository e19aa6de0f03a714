"""The answer to one request as it grows, on the rank that chooses tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_star.config.generate import InferenceConfig
from nemo_star.engine.engine import Prefill, Step
from nemo_star.engine.sampling import Sampler
from nemo_star.serving.requests import Request
from nemo_star.text.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class Result:
    """A finished answer: our fields of its JSON line and, where wanted, the logits [new_tokens, vocab] float32."""

    line: dict[str, Any]
    logits: Tensor | None


class Answer:
    """Chooses tokens, notices the end, keeps text, token ids and times.

    Args:
        end_ids: tokens that end the answer.
        show: called with each piece of text as it becomes final.
        keep_logits: whether `logits` fills, one [vocab] row per token.
    """

    def __init__(
        self,
        request: Request,
        inference: InferenceConfig,
        tokenizer: Tokenizer | None,
        *,
        end_ids: frozenset[int],
        show: Callable[[str], None],
        keep_logits: bool,
    ) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.logits: list[Tensor] = []
        self.finish_reason = "length"
        self._sampler = Sampler(inference, inference.seed + request.index)
        self._end_ids = end_ids
        self._show = show
        self._keep_logits = keep_logits
        self._stream = TextStream(tokenizer, inference.end_strings) if tokenizer else None
        self._started = self._first_token = self._last_token = time.perf_counter()

    def choose(self, logits: Tensor) -> tuple[int, bool]:
        """The next token, and whether it ends the answer; logits [vocab] float32."""
        token = self._sampler(logits)
        self._last_token = time.perf_counter()
        if not self.token_ids:
            self._first_token = self._last_token
        self.token_ids.append(token)
        if self._stream:
            self._show(self._stream.push(token))
        ended = token in self._end_ids or (self._stream is not None and self._stream.ended)
        if ended:
            self.finish_reason = "stop"
        return token, ended

    def keep(self, step: Step) -> None:
        if self._keep_logits and step.logits is not None:
            self.logits.append(step.logits.cpu())

    def finish(self, prefill: Prefill) -> Result:
        """No more tokens come: show what was held back, and close the books."""
        if self._stream:
            self._show(self._stream.finish())
        line = {
            "text": self._stream.text if self._stream else None,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "context_tokens": len(self.request.context_ids),
            "query_tokens": len(self.request.query_ids),
            "stats": self._stats(prefill),
        }
        return Result(line, torch.stack(self.logits) if self.logits else None)

    def _stats(self, prefill: Prefill) -> dict[str, Any]:
        """Times in seconds; decode speed counts the tokens after the first."""
        decoding = self._last_token - self._first_token
        return {
            "prefill_seconds": prefill.seconds,
            "time_to_first_token_seconds": self._first_token - self._started,
            "decode_tokens_per_second": (len(self.token_ids) - 1) / decoding if decoding > 0 else None,
            "kv_tokens_per_cp_rank": prefill.kv_tokens_per_cp_rank,
        }


def summary(stats: dict[str, Any]) -> str:
    """Times of one answered question, for a person."""
    speed = stats["decode_tokens_per_second"]
    return (
        f"prefill {stats['prefill_seconds']:.2f} s, first token after {stats['time_to_first_token_seconds']:.2f} s"
        + (f", then {speed:.1f} tokens/s" if speed else "")
    )
