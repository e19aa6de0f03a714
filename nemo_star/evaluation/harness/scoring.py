"""Log-probabilities of continuations, as rows of decode: they see all of the context, the query and each other."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_star.engine.context import EncodedContext, Sequence
from nemo_star.engine.engine import Engine
from nemo_star.engine.scheduler import MAX_STEP_TOKENS

MAX_LOGITS = 2**27
"""Of one step, 4 bytes each, which lie in memory twice."""


@dataclass(frozen=True)
class Score:
    """Continuations of one prompt; the result is (log-probability, whether greedy decoding gives it) of each."""

    context: array[int]
    query: list[int]
    continuations: list[list[int]] = field(default_factory=list)


@dataclass(eq=False)
class _Run:
    """Tokens after the query, and the continuations whose tokens are all predicted from them."""

    tokens: Ids[int]
    numbers: list[int]
    sequence: Sequence
    done: int = 0


def scores(engine: Engine, context: EncodedContext, work: Score) -> list[tuple[float, bool]]:
    """Of each continuation, on the replica's first rank; all its ranks call this alike.

    The query runs once, each continuation in a fork of its sequence, and those that differ in the last token only run
    together, as one-token choices do. A continuation of many tokens runs in pieces, so that the logits of a step are
    bounded.
    """
    size = max(1, min(MAX_STEP_TOKENS, MAX_LOGITS // engine.stage.vocab_size))
    longest = max(map(len, work.continuations))
    sequence = engine.sequence(context, max_tokens=len(work.query) + longest)
    *before, last = work.query
    for start in range(0, len(before), size):
        engine.decode([(sequence, before[start : start + size])])
    runs: dict[tuple[int, ...], _Run] = {}
    for number, continuation in enumerate(work.continuations):
        tokens = (last, *continuation[:-1])
        if tokens not in runs:
            runs[tokens] = _Run(tokens, [], sequence.fork())
        runs[tokens].numbers.append(number)
    found = [(0.0, True)] * len(work.continuations)
    left = list(runs.values())
    while left:
        batch = _batch(left, size)
        pieces = [(run.sequence, run.tokens[run.done : run.done + count]) for run, count in batch]
        logits = engine.decode(pieces, scored=range(len(batch)))
        if logits is not None:
            for (run, count), after in zip(batch, logits.split([count for _, count in batch]), strict=True):
                _add(found, run, [work.continuations[n][run.done : run.done + count] for n in run.numbers], after)
        for run, count in batch:
            run.done += count
        left = [run for run in left if run.done < len(run.tokens)]
    return found


def _batch(runs: Ids[_Run], size: int) -> list[tuple[_Run, int]]:
    """The next tokens of as many runs as there is room for."""
    batch, room = [], size
    for run in runs:
        count = min(room, len(run.tokens) - run.done)
        if count:
            batch.append((run, count))
        room -= count
    return batch


def _add(found: list[tuple[float, bool]], run: _Run, targets: list[list[int]], logits: Tensor) -> None:
    """What the logits [tokens, vocab] float32 after a piece of a run say of the tokens that follow it."""
    logprobs, likeliest = logits.log_softmax(dim=-1), logits.argmax(dim=-1)
    for number, following in zip(run.numbers, targets, strict=True):
        tokens = torch.tensor(following, device=logits.device)
        logprob = float(logprobs.gather(1, tokens[:, None]).sum(dtype=torch.float64))
        before, is_greedy = found[number]
        found[number] = before + logprob, is_greedy and bool((tokens == likeliest).all())
