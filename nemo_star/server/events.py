"""What the engine's thread tells those who wait for a job."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_star.engine.sampling import TokenLogprobs


@dataclass(frozen=True)
class Progress:
    """Of a context that is being encoded."""

    done_by_rank: list[tuple[int, int]]
    """(blocks encoded, blocks in all) of each cp rank."""
    tokens: int
    """Of the context."""
    found_tokens: int
    """Of these, known before."""
    seconds: float
    """Since its turn came."""
    seconds_left: float | None
    """An estimate from the blocks so far; None before the first one is done."""

    @property
    def blocks(self) -> tuple[int, int]:
        """Encoded, in all."""
        return sum(done for done, _ in self.done_by_rank), sum(count for _, count in self.done_by_rank)


@dataclass(frozen=True)
class Encoded:
    """The context is there."""

    tokens: int
    found_tokens: int
    """Of it, not encoded for this job: known before, or on their way for another one."""
    queue_seconds: float
    prefill_seconds: float
    """From when its turn came until it was there; 0 for one that was."""
    kept: str | None = None
    """`memory` or `disk`; None: it did not fit beside those in use."""
    warning: str | None = None
    """Why it is not on disk, where it should be."""


@dataclass(frozen=True)
class Token:
    """One more token of a sample."""

    sample: int
    token: int
    text: str
    """What can be shown with it; text is held back where it may still change."""
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class SampleEnded:
    """A sample is complete."""

    sample: int
    finish_reason: str
    text: str
    """What was held back."""


@dataclass(frozen=True)
class QueryScores:
    """Log-probabilities of the query's tokens, each given those before it."""

    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class Answered:
    """The job is done."""


@dataclass(frozen=True)
class Failed:
    """The job ends here."""

    message: str
    status: int = 500
    """HTTP's."""


Event = Progress | Encoded | Token | SampleEnded | QueryScores | Answered | Failed
