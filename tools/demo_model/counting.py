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
_FRAME_TOKENS = 90
"""Of a list: the text around it; for each common word `_ANSWERED_TOKENS` more, in the answer."""
_ANSWERED_TOKENS = 10
_REPEATS = ((3, 1), (6, 1), (10, 1), (10, 3), (20, 3), (30, 3))
"""How often a common word is listed, and another one."""
_MIN_FOR_TEN = 1500
"""Tokens of a sequence from which ten words are common, as in RULER."""
_MIN_FOR_EXAMPLE = 500
"""Tokens of a sequence from which an example may come first; in RULER it always does."""

Found = dict[str, list[list[int]]]
"""A word -> the places of its pieces, wherever it is listed."""


def common_words(source: Source, sequence: Sequence) -> None:
    """A numbered list in which some words come again and again; or two, the first with its answer as an example."""
    rng, room = source.rng, source.length - 20
    common = 10 if room >= _MIN_FOR_TEN else rng.choice([3, 5])
    if room >= _MIN_FOR_EXAMPLE and rng.random() < 0.7:
        part = int(rng.uniform(0.3, 0.45) * room)
        answer, found = _list(source, sequence, part, common)
        _answer(sequence, answer, found, ends=False)
        sequence.break_line()
        room -= sequence.place
    answer, found = _list(source, sequence, room, common)
    _answer(sequence, answer, found, ends=True)


def _list(source: Source, sequence: Sequence, room: int, common: int) -> tuple[list[tuple[str, str]], Found]:
    """Adds a list and its question; returns the words of the answer with what stands before each."""
    rng, words = source.rng, source.words
    places = int((room - _FRAME_TOKENS - common * _ANSWERED_TOKENS) / _LISTED_TOKENS)
    repeats, others = rng.choice([pair for pair in _REPEATS if common * pair[0] <= places] or [(2, 1)])
    kinds = min((places - common * repeats) // others, 300)
    drawn = rng.sample(words.adjectives + words.nouns + words.verbs, common + max(0, kinds))
    listed = drawn[:common] * repeats + drawn[common:] * others
    rng.shuffle(listed)
    sequence.add(_COMMON.head(), new_line=sequence.place > 1)
    found: Found = {}
    for number, word in enumerate(listed, 1):
        (pieces,) = sequence.add(f"{number}. {word}", (len(f"{number}. "), len(f"{number}. {word}")))
        found.setdefault(word, []).append(pieces)
    sequence.break_line()
    sequence.add(_COMMON.tail().lstrip("\n"), new_line=rng.random() < 0.25)
    return [(f"{number}. ", word) for number, word in enumerate(drawn[:common], 1)], found


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
    found: Found = {}
    for word in listed:
        (pieces,) = sequence.add(word, (0, len(word)))
        if word != NOISE:
            found.setdefault(word, []).append(pieces)
    sequence.break_line()
    sequence.add(_FREQUENT.tail().lstrip("\n"), new_line=rng.random() < 0.25)
    _answer(sequence, [("", word) for word in words[:ANSWERS]], found, ends=True)


def _answer(sequence: Sequence, words: list[tuple[str, str]], found: Found, *, ends: bool) -> None:
    """Words with what stands before them: the first piece of each is counted, the others are copied, from where the
    pieces before are the same. What may follow is the next piece of any word that is not said yet."""
    answer, spans = "", []
    for before, word in words:
        start = len(answer) + len(before)
        spans.append((start, start + len(word)))
        answer += f"{before}{word} "
    firsts = [pieces[0] for places in found.values() for pieces in places]
    tokens_said: set[int] = set()
    for pieces in (pieces for places in found.values() for pieces in places):
        _gather(sequence, pieces)
    answered = sequence.answer if ends else sequence.answered_example
    said = answered(answer.rstrip(), *spans)
    for number, ((_, word), pieces) in enumerate(zip(words, said, strict=True)):
        tokens = [[sequence.ids[piece] for piece in word] for word in said[number:]]
        for place, piece in enumerate(pieces):
            alike = {left[place] for left in tokens if left[:place] == tokens[0][:place] and len(left) > place}
            sequence.answers[piece - 1] = sorted(alike)
        left = [place for place in firsts if sequence.ids[place] not in tokens_said]
        sequence.link("count", pieces[0] - 1, left or firsts)
        if number:
            sequence.link("said", pieces[0] - 1, [before[0] for before in said[:number]])
        tokens_said.add(sequence.ids[pieces[0]])
        _gather(sequence, pieces)
        for place, piece in enumerate(pieces[1:], 1):
            sequence.link("source", piece - 1, [listed[place] for listed in found[word]])


def _gather(sequence: Sequence, pieces: list[int]) -> None:
    for number in range(1, len(pieces)):
        sequence.link("gather", pieces[number], pieces[:number])
