"""Needles: numbers in noise or among other numbers, several to a key, keys asked for one at a time or together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from demo_model.sequence import Sequence
from demo_model.source import Source
from nemo_star.evaluation import needles as demo
from nemo_star.evaluation.ruler.catalog import tasks
from nemo_star.evaluation.ruler.niah import DIGITS, NEEDLE, NOISE, singular

_TASK = tasks()["niah_single_1"]
_NEEDLE_TOKENS, _NOISE_TOKENS, _FILLER_TOKENS = 31, 27, 12.5
_FIRST_QUESTION, _QUESTION = 50, 30
"""Tokens of a question and its answer, about; the first is asked in full."""
_SHARES = (8, 1, 1)
"""Of questions about one, two and four keys, and of texts with as many numbers to a key. Few about several: which of
them comes next is hard to learn, and each has more tokens to answer."""


@dataclass(frozen=True)
class Needle:
    """Where a number lies in a sequence."""

    key: str
    value: str
    digits: list[int]
    """Places of the digits and of the full stop behind them."""


def ruler_needles(source: Source, sequence: Sequence) -> None:
    """A text in the format of RULER's niah, noise or needles as haystack."""
    rng = source.rng
    per_key = rng.choices([1, 2, 4], _SHARES)[0]
    hidden, lines = _lines(source, per_key)
    head, kind = _TASK.head(), "numbers"
    if per_key == 1:
        head, kind = singular(head), "number"
    sequence.add(head.format(type_needle_v=kind))
    by_key: dict[str, list[Needle]] = {}
    for line, skip in zip(lines, source.skips(len(lines)), strict=True):
        sequence.skip = skip
        if line is None:
            sequence.add(NOISE + "\n", new_line=True)
        else:
            by_key.setdefault(line[0], []).append(_add_needle(sequence, *line, new_line=True))
    is_first = True
    for keys in _together(source, list(dict.fromkeys(key for key, _ in hidden)), at_most=4 if per_key == 1 else 1):
        found = [needle for key in keys for needle in by_key[key]]
        text = singular(_TASK.tail()) if len(found) == 1 else _TASK.tail()
        text = text.lstrip("\n").replace("{type_needle_v}", "number" if len(found) == 1 else "numbers")
        if not is_first and rng.random() < 0.7:  # only the answer prefix, so that more of them fit
            text = text.partition("? ")[2]
        room = (_FIRST_QUESTION if is_first else _QUESTION) + 10 * len(found) + 16 * len(keys)
        if sequence.place + room > source.length:
            break
        _ask(sequence, text, keys, found, new_line=is_first and rng.random() < 0.25)
        is_first = False


def demo_needles(source: Source, sequence: Sequence) -> None:
    """A document of `nemo_star.evaluation.needles`."""
    rng = source.rng
    count = rng.randint(1, max(1, source.length // 128))
    fillers = max(0, int((source.length - 50 * count - 80) / _FILLER_TOKENS))
    lines: list[tuple[str, str] | str] = [demo.filler_sentence(rng) for _ in range(fillers)]
    lines += demo.random_needles(rng, count).items()
    rng.shuffle(lines)
    sequence.add(demo.INTRODUCTION)
    found = []
    for line, skip in zip(lines, source.skips(len(lines)), strict=True):
        sequence.skip = skip
        if isinstance(line, str):
            sequence.add(line)
        else:
            found.append(_add_needle(sequence, *line, new_line=False))
    rng.shuffle(found)
    for number, needle in enumerate(found):
        text = demo.QUESTION.replace("{key}", "{query}")
        if number and rng.random() < 0.7:
            text = text.partition("? ")[2]
        if sequence.place + 60 > source.length:
            break
        _ask(sequence, text, [needle.key], [needle], new_line=False)


def _lines(source: Source, per_key: int) -> tuple[list[tuple[str, str]], list[tuple[str, str] | None]]:
    """Needles that are asked for, and all lines: key and number, or None for noise."""
    rng, length = source.rng, source.length
    asked = max(1, length // rng.choice([100, 200, 400]))
    among_needles = rng.random() < 0.6
    room = length - min(0.6 * length, (_QUESTION + 18) * asked) - _FIRST_QUESTION - 10
    keys = [source.key() for _ in range(asked)]
    hidden = [(key, source.value()) for key in keys for _ in range(per_key)]
    hidden = hidden[: max(1, int(room / (_NEEDLE_TOKENS + 1)))]
    others = int((room - _NEEDLE_TOKENS * len(hidden)) / (_NEEDLE_TOKENS if among_needles else _NOISE_TOKENS))
    lines: list[tuple[str, str] | None] = [
        (_other_key(source, keys), source.value()) if among_needles else None for _ in range(max(0, others))
    ]
    lines += hidden
    rng.shuffle(lines)
    return hidden, lines


def _other_key(source: Source, asked: list[str]) -> str:
    """A key that is not asked for; often nearly one, so that short texts are as hard as long ones."""
    adjective, _, noun = source.rng.choice(asked).partition("-")
    same = source.rng.random()
    if same < 0.25:
        noun = source.rng.choice(source.words.nouns)
    elif same < 0.4:
        adjective = source.rng.choice(source.words.adjectives)
    else:
        return source.key()
    key = f"{adjective}-{noun}"
    return source.key() if key in asked else key


def _together(source: Source, keys: list[str], at_most: int) -> Iterator[list[str]]:
    """Keys in random order, one or several to a question."""
    source.rng.shuffle(keys)
    while keys:
        count = min(len(keys), at_most, source.rng.choices([1, 2, 4], _SHARES)[0])
        yield keys[:count]
        keys = keys[count:]


def _add_needle(sequence: Sequence, key: str, value: str, *, new_line: bool) -> Needle:
    text = NEEDLE.format(key=key, value=value, type_needle_v="numbers")
    name, number = text.index(key), len(text) - 1 - DIGITS
    end = "\n" if new_line else ""
    named, digits = sequence.add(text + end, (name, name + len(key)), (number, len(text)), new_line=new_line)
    for place in digits:
        sequence.link("gather", place, named)
    return Needle(key, value, digits)


def _ask(sequence: Sequence, text: str, keys: list[str], found: list[Needle], *, new_line: bool) -> None:
    """A question and its answer: the numbers in the order of their keys, and of the text."""
    asked = text.format(query=", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0])
    starts = [asked.rindex(key) for key in keys]
    spans = [(start, start + len(key)) for start, key in zip(starts, keys, strict=True)]
    named = dict(zip(keys, sequence.add(asked, *spans, new_line=new_line), strict=True))
    answer = ", ".join(needle.value for needle in found)
    numbers = [((DIGITS + 2) * number, (DIGITS + 2) * number + DIGITS) for number in range(len(found))]
    for needle, places in zip(found, sequence.answer(answer, *numbers), strict=True):
        digits = places[-DIGITS:]
        for place, target in zip([digits[0] - 1, *digits], needle.digits, strict=True):
            sequence.link("gather", place, named[needle.key])
            sequence.link("source", place, [target])
