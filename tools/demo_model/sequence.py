"""A training sequence: tokens, positions, answers, and which token a guided head should look at from which place."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo_model.tokenizer import BOS, EOS

Span = tuple[int, int]
"""Characters [start, stop) of a text."""
MAX_LINKS = 160
"""Places of a sequence whose attention one head is guided at."""


class Pieces:
    """Tokens of a text, with their characters; of a text as it stands behind a line break, too."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(maxsize=4096)(self._of)

    def _of(self, text: str, new_line: bool) -> tuple[list[int], list[Span]]:
        if not new_line:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
            return encoded.ids, encoded.offsets
        encoded = self._tokenizer.encode("\n" + text, add_special_tokens=False)  # "▁", "\n", the text
        return encoded.ids[2:], [(start - 1, stop - 1) for start, stop in encoded.offsets[2:]]


@dataclass
class Sequence:
    """What is trained on; grows from left to right."""

    pieces: Pieces
    ids: list[int] = field(default_factory=lambda: [BOS])
    positions: list[int] = field(default_factory=lambda: [0])
    answers: dict[int, list[int]] = field(default_factory=dict)
    """A place -> the tokens that may follow: one; where an answer has no order, the next of any of its parts."""
    links: dict[str, list[tuple[int, list[int]]]] = field(default_factory=lambda: defaultdict(list))
    """By the head's role: a place, and the places that it attends to.

    gather: from a place of a number (or a name) to all of the name it belongs to; of a counted word to its start.
    offset: from the end of an assignment to a letter of what is assigned.
    source: from a place of an answer to what it copies.
    chain: from a place of a name in an answer to the end of its assignment.
    said: from before a counted word in an answer to the words that are answered already.
    count: from there to all words that are left to count.
    """
    skip: int = 0
    """Positions left out before the next token."""

    @property
    def place(self) -> int:
        """Of the next token."""
        return len(self.ids)

    def add(self, text: str, *spans: Span, new_line: bool = False) -> list[list[int]]:
        """Append a text; returns the places of the tokens of each span."""
        ids, offsets = self.pieces.of(text, new_line)
        first = self.place
        self.add_ids(ids)
        return [
            [first + number for number, (start, stop) in enumerate(offsets) if start < end and stop > begin]
            for begin, end in spans
        ]

    def add_ids(self, ids: list[int]) -> None:
        position = self.positions[-1] + 1 + self.skip
        self.skip = 0
        self.ids += ids
        self.positions += range(position, position + len(ids))

    def break_line(self) -> None:
        self.add_ids(self.pieces.of("\n", new_line=False)[0][-1:])

    def answer(self, text: str, *spans: Span) -> list[list[int]]:
        """Append an answer and an end of sequence, each token of which the place before predicts."""
        places = self.answered_example(text, *spans)
        self.add_ids([EOS])
        self.answers[self.place - 2] = [EOS]
        return places

    def answered_example(self, text: str, *spans: Span) -> list[list[int]]:
        """The same of an answer that is followed by more."""
        first = self.place
        places = self.add(text, *spans)
        self.answers |= {place - 1: [self.ids[place]] for place in range(first, self.place)}
        return places

    def link(self, role: str, place: int, targets: list[int]) -> None:
        self.links[role].append((place, targets))

    def finish(self, length: int) -> None:
        self.add_ids([EOS] * (length - self.place))


@dataclass(frozen=True)
class Batch:
    """Sequences of one length."""

    ids: Tensor
    positions: Tensor
    answers: Tensor
    """Row, number of the place, place, token that may follow."""
    links: dict[str, Tensor]
    """By role: row, number of the place among those of the role, place, target."""

    @classmethod
    def of(cls, sequences: list[Sequence]) -> Batch:
        roles = {role for sequence in sequences for role in sequence.links}
        places = [(row, place) for row, sequence in enumerate(sequences) for place in sequence.answers]
        rows = [
            (row, number, place, token)
            for number, (row, place) in enumerate(places)
            for token in sequences[row].answers[place]
        ]
        return cls(
            torch.tensor([sequence.ids for sequence in sequences]),
            torch.tensor([sequence.positions for sequence in sequences]),
            torch.tensor(rows),
            {role: _links([sequence.links.get(role, []) for sequence in sequences]) for role in sorted(roles)},
        )


def _links(by_row: list[list[tuple[int, list[int]]]]) -> Tensor:
    found, number = [], 0
    for row, links in enumerate(by_row):
        step = max(1, len(links) // MAX_LINKS)
        for place, targets in links[::step]:
            few = targets[:: max(1, len(targets) // 64)]
            found += [(row, number, place, target) for target in few]
            number += 1
    return torch.tensor(found)
