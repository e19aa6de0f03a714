"""Makes training sequences in RULER's formats, to the letter."""

from __future__ import annotations

import random
from collections.abc import Callable

from demo_model import chains, counting, needles
from demo_model.sequence import Pieces, Sequence
from demo_model.source import Source
from demo_model.words import Words

_TASKS: dict[str, Callable[[Source, Sequence], None]] = {
    "needles": needles.ruler_needles,
    "old": needles.demo_needles,
    "vt": chains.assignments,
    "cwe": counting.common_words,
    "fwe": counting.frequent_words,
}


class Maker:
    """Makes sequences of one length."""

    def __init__(self, pieces: Pieces, words: Words, rng: random.Random, length: int, *, skip_to: int) -> None:
        self._source = Source(words, rng, length, skip_to)
        self._pieces = pieces

    def make(self, task: str) -> Sequence:
        """One with an answer; drawn again where it came out too long."""
        while True:
            sequence = Sequence(self._pieces)
            _TASKS[task](self._source, sequence)
            if sequence.answers and sequence.place <= self._source.length:
                sequence.finish(self._source.length)
                return sequence
