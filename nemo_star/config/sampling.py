"""How tokens are chosen and when an answer ends, for one question."""

from __future__ import annotations

from dataclasses import dataclass

MIN_TEMPERATURE = 1e-3
MAX_SEED = 2**62
DEFAULT_SEED = 1234


@dataclass(frozen=True)
class SamplingParams:
    """Of `LLM.generate`, in the field's words."""

    max_tokens: int = 128
    temperature: float = 0.0
    """0: the likeliest token at every step."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to at least top_p; 1 keeps all."""
    seed: int = DEFAULT_SEED
    """Sample i of a question is drawn with seed + i, whatever is asked beside it."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, and are not part of its text."""
    ignore_eos: bool = False
    n: int = 1
    """Samples of each question."""
    logits: bool = False
    """Keep the logits that each token was taken from."""
    logprobs: int | None = None
    """Give each token's log-probability (before temperature, top-k and top-p), and those of so many likeliest ones."""

    def __post_init__(self) -> None:
        for names, expected in (("max_tokens top_k seed n", int), ("temperature top_p", int | float)):
            for name in names.split():
                if not isinstance(getattr(self, name), expected):
                    raise ValueError(f"SamplingParams: {name}={getattr(self, name)!r} must be a number")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        for name in ("max_tokens", "n"):
            if getattr(self, name) < 1:
                raise ValueError(f"SamplingParams: {name}={getattr(self, name)} must be at least 1")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"SamplingParams: temperature={self.temperature} must be 0 (the likeliest token) or at least "
                f"{MIN_TEMPERATURE}"
            )
        if self.logprobs is not None and (not isinstance(self.logprobs, int) or self.logprobs < 0):
            raise ValueError(f"SamplingParams: logprobs={self.logprobs!r} must be 0 or more, or None")
        check_choice("SamplingParams: ", top_k=self.top_k, top_p=self.top_p, seed=self.seed)
        if "" in self.stop:
            raise ValueError("SamplingParams: stop holds an empty string, which would end every answer at once")


def check_choice(prefix: str, *, top_k: int, top_p: float, seed: int) -> None:
    """Raises ValueError for values that no choice of tokens can have; `prefix` names their group."""
    if top_k < 0:
        raise ValueError(f"{prefix}top_k={top_k} must be 0 (keep all) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"{prefix}top_p={top_p} must be above 0 and at most 1")
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"{prefix}seed={seed} must be at least 0 and below {MAX_SEED}")
