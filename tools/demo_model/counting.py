"""Words to count: RULER's common words of a list, and frequent coded words."""

from __future__ import annotations

import string

from demo_model.sequence import Sequence
from demo_model.source import Source
from nemo_star.evaluation.ruler.catalog import tasks
from nemo_star.evaluation.ruler.frequent_words import ALPHA, ANSWERS, LETTERS, NOISE, ZETA

_COMMON, _FREQUENT = tasks()["cwe"], tasks()["fwe"]
_LISTED_TOKENS = 8.3
"""A word of a list and its number."""
_MIN_FOR_TEN = 1500
"""Tokens of a sequence from which ten words are common, as in RULER."""


def common_words(source: Source, sequence: Sequence) -> None:
    """A numbered list in which some words come again and again."""
    rng, words = source.rng, source.words
    common = rng.choice([3, 5, 10]) if source.length < _MIN_FOR_TEN else 10
    places = (source.length - 80 - common * 10) / _LISTED_TOKENS
    others = rng.choice([1, 1, 3])
    repeats = rng.choice([3, 6, 10] if others == 1 else [10, 20, 30])
    if places - common * repeats < 2 * others:
        repeats, others = 3, 1
    kinds = max(2, int((places - common * repeats) / others))
    drawn = rng.sample(words.adjectives + words.nouns + words.verbs, common + kinds)
    listed = drawn[:common] * repeats + drawn[common:] * others
    rng.shuffle(listed)
    sequence.add(_COMMON.head())
    found: dict[str, list[list[int]]] = {}
    for number, word in enumerate(listed, 1):
        (pieces,) = sequence.add(f"{number}. {word}", (len(f"{number}. "), len(f"{number}. {word}")))
        found.setdefault(word, []).append(pieces)
    sequence.break_line()
    sequence.add(_COMMON.tail().lstrip("\n"), new_line=rng.random() < 0.25)
    _answer(sequence, [(f"{number}. ", word) for number, word in enumerate(drawn[:common], 1)], found)


def frequent_words(source: Source, sequence: Sequence) -> None:
    """Coded words whose numbers fall by Zipf's law, among dots."""
    rng = source.rng
    room = source.length - 120
    words = ["".join(rng.choices(string.ascii_lowercase, k=LETTERS)) for _ in range(max(6, room // 50))]
    size = room / rng.choice([2.4, 2.7, 3.2])
    listed = [NOISE] * int(size / ZETA)
    for rank, word in enumerate(words, 2):
        listed += [word] * int(size * rank**-ALPHA / ZETA)
    rng.shuffle(listed)
    sequence.add(_FREQUENT.head())
    found: dict[str, list[list[int]]] = {}
    for word in listed:
        (pieces,) = sequence.add(word, (0, len(word)))
        if word != NOISE:
            found.setdefault(word, []).append(pieces)
    sequence.break_line()
    sequence.add(_FREQUENT.tail().lstrip("\n"), new_line=rng.random() < 0.25)
    _answer(sequence, [("", word) for word in words[:ANSWERS]], found)


def _answer(sequence: Sequence, words: list[tuple[str, str]], found: dict[str, list[list[int]]]) -> None:
    """Words with what stands before them: the first piece of each is counted, the others are copied, from where the
    pieces before are the same."""
    answer, spans = "", []
    for before, word in words:
        start = len(answer) + len(before)
        spans.append((start, start + len(word)))
        answer += f"{before}{word} "
    firsts = [pieces[0] for places in found.values() for pieces in places]
    for pieces in (pieces for places in found.values() for pieces in places):
        _gather(sequence, pieces)
    for (_, word), pieces in zip(words, sequence.answer(answer.rstrip(), *spans), strict=True):
        sequence.link("count", pieces[0] - 1, firsts)
        _gather(sequence, pieces)
        for number, piece in enumerate(pieces[1:], 1):
            sequence.link("source", piece - 1, [listed[number] for listed in found[word]])


def _gather(sequence: Sequence, pieces: list[int]) -> None:
    for number in range(1, len(pieces)):
        sequence.link("gather", pieces[number], pieces[:number])
