"""One sample: dense attention and each contender on the same tokens, in one engine.

Dense attention is the method with one block (an identity that tests hold), so the weights are loaded once, and both are
decoded in the same steps. Two contexts are in memory at a time: the reference and one contender's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_star.config.sampling import SamplingParams
from nemo_star.engine.context import EncodedContext
from nemo_star.evaluation.fidelity.divergence import Divergences
from nemo_star.evaluation.fidelity.mass import Rows, observed
from nemo_star.evaluation.fidelity.readings import (
    FIRST_TOKENS,
    Reading,
    by_block,
    first_tokens,
    hidden,
    later_spans,
    sampled_rows,
)
from nemo_star.llm.opened import OpenedModel
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.partition import Block

STEP_TOKENS = 64
"""That are decoded at once: what their logits take, over a vocabulary of 128K for two contexts, is 64 MiB."""

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A sample, as all ranks of a replica have it."""

    context: list[int]
    query: list[int]
    answer: list[int] | None
    """The teacher; None: what dense attention answers."""
    place: int | None
    """Which of the context's tokens begins what the answer is about, where that is known."""


class Measurement:
    """Measures samples with contenders; all ranks of a replica call it with the same.

    Args:
        contenders: by name, for contexts of the samples' length.
        rows: positions whose attention mass is measured.
        seed: of these.
    """

    def __init__(self, llm: OpenedModel, contenders: Mapping[str, AttentionConfig], *, rows: int, seed: int) -> None:
        self._llm = llm
        self._contenders = contenders
        self._rows = rows
        self._seed = seed

    def lines(self, sample: Tokens, params: SamplingParams, *, sinks: bool) -> dict[str, Line]:
        """A line for each contender; on the replica's first rank, elsewhere without values that need logits.

        Args:
            params: of an answer of dense attention.
            sinks: whether to measure attention on first tokens, too.
        """
        llm, state = self._llm, self._llm.engine.state
        tokens = len(sample.context)
        rows = sampled_rows(tokens, self._rows, self._seed)
        blocks = {name: self._blocks(settings, tokens) for name, settings in self._contenders.items()}
        lost = {name: Reading(partial(hidden, blocks=of)) for name, of in blocks.items()}
        firsts = {name: Reading(partial(first_tokens, blocks=of)) for name, of in blocks.items() if sinks}
        readings = [*lost.values(), *firsts.values()]

        def take(layer_number: int, seen: Rows) -> None:
            for reading in readings:
                reading(layer_number, seen)

        self._attend_in_one_block(tokens)
        with observed(state, take, rows):
            reference = llm.engine.encode(sample.context)
        is_given = sample.answer is not None
        if not is_given:
            sample = dataclasses.replace(sample, answer=self._answer(reference, sample.query, params))
        found = {}
        for name, settings in self._contenders.items():
            line = self._forced(reference, settings, sample, blocks[name])
            line |= self._lost(lost[name], blocks[name], rows)
            if sinks:
                line["first_tokens"] = self._first_tokens(firsts[name], settings, blocks[name], sample.context, rows)
            found[name] = {"context_tokens": tokens, "query_tokens": len(sample.query), "given": is_given, **line}
        return found

    def _blocks(self, settings: AttentionConfig, tokens: int) -> tuple[Block, ...]:
        self._llm.attend_by(settings)
        return self._llm.method.partition(tokens, 1).ranks[0]

    def _attend_in_one_block(self, tokens: int) -> None:
        llm = self._llm
        llm.attend_by(dataclasses.replace(llm.config.attention, block_size=tokens, anchor_size=0, overlap_size=0))

    def _answer(self, reference: EncodedContext, query: list[int], params: SamplingParams) -> list[int]:
        """Greedy, of dense attention, end token included."""
        llm = self._llm
        choose = llm.completion(params, 0).choose if llm.is_first_of_replica else None
        steps = llm.engine.generate(reference, query, max_tokens=params.max_tokens, choose=choose)
        return [step.token for step in steps]

    def _forced(
        self, reference: EncodedContext, settings: AttentionConfig, sample: Tokens, blocks: Sequence[Block]
    ) -> Line:
        """Query and answer on both contexts; where the reference looks when it answers."""
        engine = self._llm.engine
        self._llm.attend_by(settings)
        assert sample.answer is not None
        contexts = [reference, engine.encode(sample.context)]
        sequences = [engine.sequence(context) for context in contexts]
        sources = Reading(partial(by_block, blocks=blocks))
        of_query, of_answer = Divergences(), Divergences()
        answering = [sample.query[-1], *sample.answer[:-1]]
        for tokens, found, watch in ((sample.query[:-1], of_query, False), (answering, of_answer, True)):
            for start in range(0, len(tokens), STEP_TOKENS):
                next_tokens = tokens[start : start + STEP_TOKENS]
                with observed(engine.state, sources, decoded=True) if watch else nullcontext():
                    logits = engine.decode([(sequence, next_tokens) for sequence in sequences], scored=(0, 1))
                if logits is not None:
                    found.add(*logits.split(len(next_tokens)))
        where = self._gathered(sources).mean(dim=(0, 1)) / len(answering)
        return {
            "kl": _rounded(of_answer.kl),
            "agree": list(map(int, of_answer.agree)),
            "query_kl": _rounded(of_query.kl),
            "query_agree": list(map(int, of_query.agree)),
            "blocks": len(blocks),
            "mass_by_block": _rounded(where.tolist()),
            "block": int(where.argmax()),
            "known_block": None if sample.place is None else _block_at(blocks, sample.place),
        }

    def _lost(self, reading: Reading, blocks: Sequence[Block], rows: Tensor) -> Line:
        """Shares: of each head, by layer, over all blocks after the first; of each block, by layer, over all heads."""
        sums = self._gathered(reading)
        counts = torch.tensor([_count(rows, *block.spans[0]) for block in blocks], dtype=torch.float64)
        later = counts[1:].sum().clamp_min(1.0)
        return {
            "lost": _rounded((sums.sum(dim=2) / later).tolist()),
            "lost_by_block": _rounded((sums.mean(dim=1) / counts.clamp_min(1.0)).tolist()),
        }

    def _first_tokens(
        self,
        dense: Reading,
        settings: AttentionConfig,
        blocks: Sequence[Block],
        context: list[int],
        rows: Tensor,
    ) -> Line:
        """By variant and layer: the mass on each of a block's first tokens, then on the context's."""
        llm = self._llm
        found, variants = {"dense": dense}, {"no anchor": dataclasses.replace(settings, anchor_size=0)}
        if settings.anchor_size != 0:
            variants["anchor"] = settings
        for variant, changed in variants.items():
            found[variant] = Reading(partial(first_tokens, blocks=blocks))
            llm.attend_by(changed)
            with observed(llm.engine.state, found[variant], rows):
                llm.engine.encode(context)
        count = sum(_count(rows, start + first, stop) for (start, stop), first in later_spans(blocks))
        means = {name: self._gathered(reading).mean(dim=1) / max(1, count) for name, reading in found.items()}
        return {
            variant: {
                "block": _rounded(mean[:, :FIRST_TOKENS].tolist()),
                "start": _rounded(mean[:, FIRST_TOKENS:].tolist()),
            }
            for variant, mean in means.items()
        }

    def _gathered(self, reading: Reading) -> Tensor:
        return reading.gathered(self._llm.groups, self._llm.description.model.num_layers)


def _block_at(blocks: Sequence[Block], position: int) -> int:
    return sum(block.spans[0][0] <= position for block in blocks) - 1


def _count(rows: Tensor, start: int, stop: int) -> int:
    """Rows at positions [start, stop)."""
    return int(((rows >= start) & (rows < stop)).sum())


def _rounded(values: Any) -> Any:
    """Six digits are enough for a line of JSON."""
    return [_rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.6g}")
