"""Choice of the next token from logits. Runs on one rank; the engine hands the choice to the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_star.config.sampling import SamplingParams


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's probabilities where a token was chosen."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens, the first one first."""


def token_logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Of a chosen token and the `count` likeliest ones; logits [vocab] float32."""
    logprobs = torch.log_softmax(logits, dim=-1)
    likeliest = logprobs.topk(min(count, logprobs.numel()))
    return TokenLogprobs(
        token,
        float(logprobs[token]),
        list(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)),
    )


class Sampler:
    """Greedy, or sampled with temperature, top-k and top-p (in this order, as in NeMo and Hugging Face).

    Sampling draws from a generator of its own on the CPU, so that a seed gives the same tokens on every device.
    """

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self.params = params
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """The chosen token id; logits [vocab] float32."""
        if self.params.temperature == 0:
            return int(logits.argmax())
        probabilities = self.probabilities(logits.cpu())
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """[vocab] float32 that sums to 1, 0 where top-k or top-p cut off; the likeliest token always stays."""
        scaled = logits.float() / self.params.temperature
        if 0 < self.params.top_k < scaled.numel():
            threshold = scaled.topk(self.params.top_k).values[-1]
            scaled = scaled.masked_fill(scaled < threshold, float("-inf"))
        if self.params.top_p < 1.0:
            ordered, order = torch.softmax(scaled, dim=-1).sort(descending=True)
            before = ordered.cumsum(dim=-1) - ordered
            is_cut = before >= self.params.top_p
            is_cut[0] = False  # a top_p that is 0 in float32
            scaled[order[is_cut]] = float("-inf")
        return torch.softmax(scaled, dim=-1)
