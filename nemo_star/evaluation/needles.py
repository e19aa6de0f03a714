"""Synthetic documents in RULER's needle-in-a-haystack format.

Source: RULER (arXiv 2404.06654), task family ``niah``: sentences "One of the special magic numbers for KEY is:
VALUE." hidden among filler, asked for with RULER's question and answer prefix. The filler is made here from a small
grammar, so that nothing has to be downloaded. Pure Python: used to train the bundled demo model, to measure it, and
by tests.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
INTRODUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
)
VALUE_DIGITS = 7

_ADJECTIVES = """
able amber ancient angry arctic autumn basic blue bold brave brief bright broad broken bronze busy calm careful cheap
clean clear clever cold common copper cosmic crimson curious damp dark deep dense distant dry dusty eager early easy
empty equal fair famous fast fierce final firm flat fond formal free fresh frozen gentle giant glad golden grand grave
gray green hidden hollow honest huge humble icy idle ivory jolly keen kind large late lazy light lively local lonely
loud lucky marble mellow mighty modern narrow neat noble northern odd open orange pale patient plain polite proud
purple quick quiet rapid rare ready rich rough round royal rural rustic sandy scarlet secret sharp shiny shy silent
silver simple sleepy slow smooth soft solid southern stable steady steep stone strange strong sunny sweet swift tall
tame tender tidy tiny vast violet warm western white wide wild winter wise wooden yellow young
""".split()

_NOUNS = """
acorn actor anchor apple arrow artist badge baker banjo barrel basket beacon beaver bishop blanket bottle bridge
bucket button cabin camel candle canoe canyon captain carpet castle cello cherry circle cliff clock cloud comet
compass copper coral cotton cradle crane crystal desert diamond dolphin donkey dragon drum eagle engine falcon farmer
feather fiddle forest fossil fountain galaxy garden garlic glacier goose grape guitar hammer harbor harvest hawk
helmet heron hockey honey island jacket jasmine jewel jungle kettle kitten ladder lagoon lantern lemon leopard letter
lion lizard magnet mango maple market meadow melon mirror monkey morning mountain museum mustard needle nickel ocean
olive onion orchid otter owl oyster paddle palace panther parrot pasture pebble pelican pencil pepper piano pigeon
pillow pilot planet pocket pony potato prairie puzzle rabbit raven ribbon river robin rocket saddle sailor salmon
scarf shadow shark shovel signal sparrow spider spoon squirrel stadium statue summit sunset swan table teacher temple
thunder tiger timber tomato tower tractor trumpet tunnel turtle valley velvet village violin wagon walnut walrus whale
whistle willow window wizard zebra
""".split()

_PLACES = "market harbor library station garden bridge school museum office valley square theater".split()
_PEOPLE = "teacher farmer doctor painter sailor baker writer neighbor student driver singer visitor".split()
_THINGS = "letter map basket ladder lamp bottle picture box chair coat clock paper".split()
_DOES = "found carried forgot painted cleaned borrowed noticed returned opened moved counted kept".split()
_TIMES = "morning evening winter summer week day night year month autumn".split()
_MOODS = "quiet busy warm cold bright empty calm crowded dark pleasant".split()
_RULER_NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_TEMPLATES = (
    "The {person} {does} the {thing} near the {place} that {time}.",
    "Every {time} the {place} was {mood}, and the {person} liked it.",
    "A {person} from the {place} {does} a {mood} {thing}.",
    "It was a {mood} {time}, so nobody came to the {place}.",
    "After the {time} the {person} and the {person2} walked to the {place}.",
    "Nobody knew why the {thing} in the {place} looked so {mood}.",
    "The {person} said that the {place} had been {mood} for a long time.",
    "Before the {time} ended, someone {does} the {thing} again.",
)


@dataclass(frozen=True)
class NeedleDocument:
    """One synthetic document: its sentences in order and the needles (key -> value) hidden in it."""

    sentences: tuple[str, ...]
    needles: dict[str, str]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def question(key: str) -> str:
    """RULER's question for one key, with its answer prefix; the answer follows after a space."""
    return QUESTION.format(key=key)


def filler_sentence(rng: random.Random) -> str:
    """One sentence that holds no needle; one in four is RULER's own "noise" haystack."""
    if rng.random() < 0.25:
        return rng.choice(_RULER_NOISE)
    return rng.choice(_TEMPLATES).format(
        person=rng.choice(_PEOPLE),
        person2=rng.choice(_PEOPLE),
        place=rng.choice(_PLACES),
        thing=rng.choice(_THINGS),
        does=rng.choice(_DOES),
        time=rng.choice(_TIMES),
        mood=rng.choice(_MOODS),
    )


def random_needles(rng: random.Random, count: int) -> dict[str, str]:
    """``count`` distinct keys (adjective-noun, as in RULER; no noun twice) with random 7-digit values."""
    if not 1 <= count <= len(_NOUNS):
        raise ValueError(f"needles in a document: {count}, must be between 1 and {len(_NOUNS)}")
    low, high = 10 ** (VALUE_DIGITS - 1), 10**VALUE_DIGITS - 1
    nouns = rng.sample(_NOUNS, count)
    return {f"{rng.choice(_ADJECTIVES)}-{noun}": str(rng.randint(low, high)) for noun in nouns}


def make_document(rng: random.Random, *, filler_sentences: int, needles: int) -> NeedleDocument:
    """A document of ``filler_sentences`` filler sentences with ``needles`` needles at random depths."""
    hidden = random_needles(rng, needles)
    return _hide(rng, hidden, [filler_sentence(rng) for _ in range(filler_sentences)])


def fit_document(
    rng: random.Random, *, tokens: int, needles: int, count_tokens: Callable[[str], int]
) -> NeedleDocument:
    """A document with as many filler sentences as fit into ``tokens`` tokens.

    ``count_tokens`` counts those of one sentence; it is taken that a document has the sum of its sentences' tokens.

    Raises:
        ValueError: not even the needles fit.
    """
    hidden = random_needles(rng, needles)
    room = tokens - count_tokens(INTRODUCTION)
    room -= sum(count_tokens(NEEDLE.format(key=key, value=value)) for key, value in hidden.items())
    if room < 0:
        raise ValueError(f"{needles} needles do not fit into a document of {tokens} tokens")
    filler: list[str] = []
    while (count := count_tokens(sentence := filler_sentence(rng))) <= room:
        filler.append(sentence)
        room -= count
    return _hide(rng, hidden, filler)


def _hide(rng: random.Random, needles: dict[str, str], filler: list[str]) -> NeedleDocument:
    sentences = list(filler)
    for key, value in needles.items():
        sentences.insert(rng.randint(0, len(sentences)), NEEDLE.format(key=key, value=value))
    return NeedleDocument(sentences=(INTRODUCTION, *sentences), needles=needles)
