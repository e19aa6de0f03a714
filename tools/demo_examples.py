"""Training sequences for the demo model (tools/train_demo_model.py): documents with needles, questions, answers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import sentencepiece
import torch
from torch import Tensor

from nemo_star.evaluation.needles import INTRODUCTION, NEEDLE, filler_sentence, question, random_needles

BOS, EOS = 1, 2
NOUN_TO_DIGITS = 4  # in a needle: "is", ":" and "▁" are between the noun and the first digit


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum: ``steps`` of about ``tokens`` tokens each, in sequences of one of ``lengths``."""

    lengths: tuple[int, ...]
    needles: tuple[int, int]  # least and most in a document
    steps: int
    learning_rate: float
    tokens: int  # in a step
    positions: int = 0  # positions skip up to this one; 0: no skipping


@dataclass
class Example:
    """A training sequence. Its links are pairs of a place and what belongs to it (see ``Batch``)."""

    ids: list[int] = field(default_factory=lambda: [BOS])
    positions: list[int] = field(default_factory=lambda: [0])
    answers: list[tuple[int, int]] = field(default_factory=list)
    nouns: list[tuple[int, int]] = field(default_factory=list)
    sources: list[tuple[int, int]] = field(default_factory=list)

    def append(self, ids: list[int], skip: int = 0) -> int:
        """Add ``ids`` after ``skip`` unused positions; returns the place of the first."""
        place, position = len(self.ids), self.positions[-1] + 1 + skip
        self.ids += ids
        self.positions += range(position, position + len(ids))
        return place

    def append_needle(self, ids: list[int], noun: int, skip: int) -> int:
        """Add a needle's sentence; returns the place of its first digit."""
        start = self.append(ids, skip)
        noun_place = start + ids.index(noun)
        first_digit = noun_place + NOUN_TO_DIGITS
        self.nouns += [(place, noun_place) for place in range(first_digit - 1, start + len(ids))]
        return first_digit

    def append_question(self, asked: list[int], answer: list[int], noun: int, first_digit: int) -> None:
        """Add a question and its answer, which the document tells from ``first_digit`` on."""
        start = self.append(asked + answer) + len(asked)
        noun_place = start - 1 - asked[::-1].index(noun)
        self.answers += enumerate(answer, start=start - 1)
        self.nouns += [(start - 1 + index, noun_place) for index in range(len(answer))]
        # After "▁": the seven digits, then the full stop, where the answer ends.
        self.sources += [(start + index, first_digit + index) for index in range(len(answer) - 1)]


@dataclass(frozen=True)
class Batch:
    """Examples of one length. A row of the links is an example, a place in it, and what belongs to that place."""

    ids: Tensor
    positions: Tensor
    answers: Tensor  # places that predict an answer: the token to predict
    nouns: Tensor  # places in a number: the place of the noun before it
    sources: Tensor  # places that predict a digit: the place of that digit in the document

    @classmethod
    def of(cls, examples: list[Example]) -> Batch:
        def links(name: str) -> Tensor:
            return torch.tensor(
                [(row, *link) for row, example in enumerate(examples) for link in getattr(example, name)]
            )

        ids, positions = [example.ids for example in examples], [example.positions for example in examples]
        return cls(torch.tensor(ids), torch.tensor(positions), links("answers"), links("nouns"), links("sources"))


class ExampleMaker:
    """Makes training sequences: BOS, a document with needles, then one question about each needle with its answer."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, rng: random.Random) -> None:
        self.encode, self.rng = tokenizer.encode, rng

    def batch(self, stage: Stage) -> Batch:
        """What one step of ``stage`` trains on."""
        length = self.rng.choice(stage.lengths)
        return Batch.of([self.example(length, stage) for _ in range(stage.tokens // length)])

    def example(self, length: int, stage: Stage) -> Example:
        """A sequence of exactly ``length`` tokens."""
        needles = random_needles(self.rng, self.rng.randint(*stage.needles))
        sentences: list[tuple[int, list[int]]] = []  # with the noun, which tells a document's needles apart; 0: filler
        questions: list[tuple[int, list[int], list[int]]] = []
        introduction = self.encode(INTRODUCTION)
        room = length - 1
        for key, value in needles.items():
            # Half the questions are only the answer prefix: shorter, so that more of them fit.
            text = question(key) if self.rng.random() < 0.5 else question(key).split("? ")[1]
            sentence = self.encode(NEEDLE.format(key=key, value=value))
            asked, answer = self.encode(text), [*self.encode(value), EOS]
            if len(sentence) + len(asked) + len(answer) <= room:
                room -= len(sentence) + len(asked) + len(answer)
                noun = self.encode(key)[-1]
                sentences.append((noun, sentence))
                questions.append((noun, asked, answer))
        if len(introduction) > room:
            introduction = []
        sentences += [(0, sentence) for sentence in self.filler(room - len(introduction))]
        self.rng.shuffle(sentences)
        self.rng.shuffle(questions)
        example, first_digits = Example(), {}
        example.append(introduction)
        for (noun, ids), skip in zip(sentences, self.skips(len(sentences), stage.positions - length), strict=True):
            if noun:
                first_digits[noun] = example.append_needle(ids, noun, skip)
            else:
                example.append(ids, skip)
        for noun, asked, answer in questions:
            example.append_question(asked, answer, noun, first_digits[noun])
        example.append([EOS] * (length - len(example.ids)))
        return example

    def filler(self, room: int) -> list[list[int]]:
        """As many filler sentences as fit into ``room`` tokens."""
        sentences = []
        while len(sentence := self.encode(filler_sentence(self.rng))) <= room:
            sentences.append(sentence)
            room -= len(sentence)
        return sentences

    def skips(self, sentences: int, most: int) -> list[int]:
        """How many positions to skip before each sentence: up to ``most``, shared among three random places."""
        skips = [0] * sentences
        if most > 0:
            total = self.rng.randint(0, most)
            ends = sorted(self.rng.randint(0, total) for _ in range(3))
            for start, end in zip([0, *ends], ends, strict=False):
                skips[self.rng.randrange(sentences)] += end - start
        return skips
