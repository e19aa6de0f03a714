"""One sample of an answer, told token by token to whoever waits for it; on the rank that chooses tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from nemo_star.config.sampling import SamplingParams
from nemo_star.engine.sampling import token_logprobs
from nemo_star.llm.opened import OpenedModel
from nemo_star.server.events import Event, Failed, QueryScores, SampleEnded, Token
from nemo_star.text.completion import Completion


class StreamedAnswer:
    """A completion whose failure is its own: nothing that goes wrong in choosing and decoding reaches the engine."""

    def __init__(self, llm: OpenedModel, params: SamplingParams, sample: int, tell: Callable[[Event], None]) -> None:
        self._texts: list[str] = []
        self._llm = llm
        self._params = params
        self._sample = sample
        self._left = params.max_tokens
        self._tell = tell

    def choose(self, logits: Tensor) -> tuple[int, bool]:
        """Logits [vocab] float32 -> (token, whether it ends the answer)."""
        try:
            token, ended = self._completion.choose(logits)
            self._left -= 1
            self._tell(Token(self._sample, token, self._taken(), self._completion.last_logprobs))
            if ended or not self._left:
                result = self._completion.finish()
                self._tell(SampleEnded(self._sample, result.finish_reason, self._taken()))
        except Exception as error:  # whatever a tokenizer raises
            self._tell(Failed(f"choosing a token failed: {type(error).__name__}: {error}"))
            return 0, True
        return token, ended

    @functools.cached_property
    def _completion(self) -> Completion:
        """Made with the first token, where its failure is the request's."""
        return self._llm.completion(self._params, self._sample, show=self._texts.append)

    def _taken(self) -> str:
        text = "".join(self._texts)
        self._texts.clear()
        return text


def query_scores(logits: Tensor, query_ids: list[int], count: int) -> QueryScores:
    """Log-probabilities of a query's tokens but the first, from the logits [query tokens, vocab] after each."""
    following = zip(logits, query_ids[1:], strict=False)
    return QueryScores([token_logprobs(after, token, count) for after, token in following])
