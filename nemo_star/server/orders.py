"""What rank 0 tells all ranks to do, in the order in which all do it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from nemo_star.config.sampling import SamplingParams


@dataclass(frozen=True)
class Ask:
    """Answer a query on a context."""

    job: int
    owner: str
    context_ids: array[int]
    query_ids: list[int]
    params: SamplingParams
    scores_query: bool = False
    """Give the log-probabilities of the query's own tokens, too."""


@dataclass(frozen=True)
class Encode:
    """Have a context in the store; on disk, too, where there is a folder."""

    job: int
    owner: str
    context_ids: array[int]


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for a job any more."""

    job: int


@dataclass(frozen=True)
class Forget:
    """Drop a context from memory and from disk."""

    owner: str
    context_ids: array[int]


@dataclass(frozen=True)
class Stop:
    """The last order: nothing comes after it."""


Order = Ask | Encode | Cancel | Forget | Stop
