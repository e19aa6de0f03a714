"""Chains of variables: RULER's variable tracking, of one to four hops, one to three chains in a text."""

from __future__ import annotations

import string

from demo_model.sequence import Sequence
from demo_model.source import Source
from nemo_star.evaluation.ruler.catalog import tasks
from nemo_star.evaluation.ruler.niah import NOISE

_TASK = tasks()["vt"]
_LETTERS = 5
_EXAMPLE_LETTERS = 3
_NOISE_TOKENS = 27
_CHAIN_TOKENS = 150
"""All of a chain, its question and answer included."""
_MIN_FOR_EXAMPLE = 700
"""Tokens of a sequence that an example fits into."""


def assignments(source: Source, sequence: Sequence) -> None:
    """A text with chains, sometimes behind an example that is answered, as in RULER."""
    rng = source.rng
    has_example = source.length >= _MIN_FOR_EXAMPLE and rng.random() < 0.6
    if has_example:
        _add_example(source, sequence)
    chains = [_names(source, sequence, rng.choice([1, 2, 3, 4, 4])) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
    values = [str(rng.randint(10000, 99998)) for _ in chains]
    noises = int((source.length - sequence.place - _NOISE_TOKENS - len(chains) * _CHAIN_TOKENS) / _NOISE_TOKENS)
    ends = _add_chains(source, sequence, chains, values, noises=max(0, noises), new_line=has_example)
    for chain in rng.sample(range(len(chains)), len(chains)):
        if sequence.place + _CHAIN_TOKENS // 2 + 45 > source.length:
            break
        before = _ask(sequence, values[chain], len(chains[chain]), new_line=rng.random() < 0.25)
        _answer(sequence, chains[chain], before, ends[chain])


def _names(source: Source, sequence: Sequence, hops: int) -> list[str]:
    """Names of a chain; only those that are spelt letter by letter."""
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(source.rng.choices(string.ascii_uppercase, k=_LETTERS))
        if name not in names and len(sequence.pieces.of(name, new_line=False)[0]) == _LETTERS:
            names.append(name)
    return names


def _add_example(source: Source, sequence: Sequence) -> None:
    names = ["".join(source.rng.choices(string.ascii_uppercase, k=_EXAMPLE_LETTERS)) for _ in range(5)]
    value = str(source.rng.randint(10000, 99998))
    _add_chains(source, sequence, [names], [value], noises=12, new_line=False)
    _ask(sequence, value, len(names), new_line=False)
    sequence.add(" ".join(names))
    sequence.break_line()


def _add_chains(
    source: Source, sequence: Sequence, chains: list[list[str]], values: list[str], *, noises: int, new_line: bool
) -> list[list[int]]:
    """A text; returns the places of the last token of each assignment, by chain."""
    sequence.add(_TASK.head(), new_line=new_line)
    lines: list[int | None] = [None] * noises
    lines += [number for number, names in enumerate(chains) for _ in names]
    source.rng.shuffle(lines)
    ends: list[list[int]] = [[] for _ in chains]
    skip, is_after_noise = 0, True
    for line, more in zip(lines, source.skips(len(lines)), strict=True):
        skip += more
        if is_after_noise:  # the places right behind an assignment belong to it
            sequence.skip, skip = skip, 0
        is_after_noise = line is None
        if line is None:
            sequence.add(NOISE + "\n", new_line=True)
            continue
        hop = len(ends[line])
        value = chains[line][hop - 1] if hop else values[line]
        ends[line].append(_add_assignment(sequence, chains[line][hop], value, is_first=hop == 0))
    return ends


def _add_assignment(sequence: Sequence, name: str, value: str, *, is_first: bool) -> int:
    """`VAR NAME = value`; returns the place of its last token.

    A letter cannot know what comes behind the equals sign. So the value is collected, and the letter copied, at the
    places from the value's last token on: letter by letter, always the same way back.
    """
    text = f"VAR {name} = " + (value if is_first else f"VAR {value}")
    named = (len("VAR "), len("VAR ") + len(name))
    end = "\n" if is_first else " \n"
    left, right = sequence.add(text + end, named, (len(text) - len(value), len(text)), new_line=True)
    left, right = left[-len(name) :], right[-len(value) :]
    if len(name) == _LETTERS:
        for number, letter in enumerate(left):
            sequence.link("gather", right[-1] + number, right)
            sequence.link("offset", right[-1] + number, [letter])
    return right[-1]


def _ask(sequence: Sequence, value: str, variables: int, *, new_line: bool) -> list[int]:
    """Returns the places of the value."""
    asked = _TASK.tail().lstrip("\n").format(query=value, num_v=variables)
    start = asked.rindex(value)
    (places,) = sequence.add(asked, (start, start + len(value)), new_line=new_line)
    return places[-len(value) :]


def _answer(sequence: Sequence, names: list[str], before: list[int], ends: list[int]) -> None:
    step = _LETTERS + 1
    spans = [(step * number, step * number + _LETTERS) for number in range(len(names))]
    for places, end in zip(sequence.answer(" ".join(names), *spans), ends, strict=True):
        letters = places[-_LETTERS:]
        for number, letter in enumerate(letters):
            sequence.link("gather", letter - 1, before)
            sequence.link("chain", letter - 1, [end + number])
        before = letters
