"""One answer as it grows, on the rank that chooses tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_star.config.sampling import SamplingParams
from nemo_star.engine.sampling import Sampler, TokenLogprobs, token_logprobs
from nemo_star.text.stream import TextStream
from nemo_star.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Result:
    """A finished answer to one question."""

    text: str | None
    """Without an end string; None where the checkpoint has no tokenizer."""
    token_ids: list[int]
    """The generated ones."""
    finish_reason: str
    """`stop` or `length`."""
    logits: Tensor | None = None
    """[tokens, vocab] float32: row i is what token i was taken from. With `SamplingParams(logits=True)`."""
    token_times: list[float] = field(default_factory=list)
    """When each token was chosen (`time.perf_counter` of the rank that chose)."""
    logprobs: list[TokenLogprobs] | None = None
    """Of each token, with `SamplingParams(logprobs=...)`."""
    samples: tuple[Result, ...] = ()
    """All `SamplingParams.n` answers; this one is the first."""


class Completion:
    """Chooses tokens, notices the end, keeps text, token ids and times.

    Args:
        seed: of this sample.
        end_ids: tokens that end the answer.
        show: called with text as it becomes final.
    """

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        tokenizer: Tokenizer | None,
        *,
        end_ids: frozenset[int],
        show: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._token_ids: list[int] = []
        self._token_times: list[float] = []
        self._logits: list[Tensor] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish_reason = "length"
        self._params = params
        self._sampler = Sampler(params, seed)
        self._end_ids = frozenset() if params.ignore_eos else end_ids
        self._show = show
        self._stream = TextStream(tokenizer, params.stop) if tokenizer else None

    def choose(self, logits: Tensor) -> tuple[int, bool]:
        """The next token, and whether it ends the answer; logits [vocab] float32."""
        if self._params.logits:
            self._logits.append(logits.cpu())
        token = self._sampler(logits)
        self._token_times.append(time.perf_counter())
        self._token_ids.append(token)
        if self._params.logprobs is not None:
            self._logprobs.append(token_logprobs(logits, token, self._params.logprobs))
        if self._stream:
            self._show(self._stream.push(token))
        ended = token in self._end_ids or (self._stream is not None and self._stream.ended)
        if ended:
            self._finish_reason = "stop"
        return token, ended

    @property
    def last_logprobs(self) -> TokenLogprobs | None:
        """Of the token chosen last, where they are wanted."""
        return self._logprobs[-1] if self._logprobs else None

    def finish(self) -> Result:
        """No more tokens come: show what was held back, and close the books."""
        if self._stream:
            self._show(self._stream.finish())
        return Result(
            text=self._stream.text if self._stream else None,
            token_ids=self._token_ids,
            finish_reason=self._finish_reason,
            logits=torch.stack(self._logits) if self._logits else None,
            token_times=self._token_times,
            logprobs=None if self._params.logprobs is None else self._logprobs,
        )
