"""Stories of bAbI with a question: made by its rules, or read from its files.

Source: facebookarchive/bAbI-tasks at commit ccd8fd6, lua/babi/tasks/WhereIsActor.lua, WhereIsObject.lua,
WhereWasObject.lua, IsDir.lua, WhoWhatGave.lua: what is asked, and when. No code of it is used, and its random numbers
are Lua's. After every two facts there is a question, if what has been said answers one; of the first five one is taken,
as BABILong makes a sample of each. How often things happen is not the data set's to the letter: stories have 6, 11, 20,
2 and 30 facts on average, there 6, 15, 51, 2 and 20.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from nemo_star.evaluation.babilong.world import World
from nemo_star.evaluation.metrics import PLACES

QUESTIONS = 5
"""Of a story."""

_PEOPLE = ("Mary", "John", "Sandra", "Daniel")
_GIVERS = ("Fred", "Bill", "Jeff", "Mary")
_GOT_THERE_QA3 = 0.2
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass(frozen=True)
class Story:
    """Facts, a question and its answer."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]
    """Facts that say the answer, by their number from 0, in their order."""


Asked = tuple[str, str, tuple[int, ...]]
"""Question, answer, support."""


def make_story(task: str, rng: random.Random) -> Story:
    """One of qa1 to qa5."""
    if task == "qa4":
        return _sides(rng)
    if task == "qa1":
        return _told(World(rng, _PEOPLE, objects=()), _where_is_person, rng)
    if task == "qa2":
        return _told(World(rng, _PEOPLE), _where_is_object, rng)
    if task == "qa3":
        return _told(World(rng, _PEOPLE, got_there=_GOT_THERE_QA3), _where_was_object, rng)
    if task == "qa5":
        return _told(World(rng, _GIVERS, gifts=True), _who_gave, rng)
    raise ValueError(f"no stories of {task}")


def _told(world: World, ask: Callable[[World, random.Random], Asked | None], rng: random.Random) -> Story:
    left = rng.randint(1, QUESTIONS)
    while True:
        world.advance()
        world.advance()
        if (asked := ask(world, rng)) is not None:
            left -= 1
            if left == 0:
                question, answer, support = asked
                return Story(tuple(world.facts), question, answer, tuple(sorted(support)))


def _where_is_person(world: World, rng: random.Random) -> Asked | None:
    person = rng.choice(list(world.told))
    return f"Where is {person}?", world.where[person], (world.told[person],)


def _where_is_object(world: World, rng: random.Random) -> Asked | None:
    known = {thing: known for thing in world.objects if (known := world.known(thing)) is not None}
    if not known:
        return None
    thing = rng.choice(list(known))
    return f"Where is the {thing}?", world.place_of(thing), known[thing].facts


def _where_was_object(world: World, rng: random.Random) -> Asked | None:
    if not world.carried:
        return None
    thing = rng.choice(sorted(world.carried))
    place, before = world.carried[thing]
    return f"Where was the {thing} before the {place}?", before.place, before.facts


def _who_gave(world: World, rng: random.Random) -> Asked | None:
    """Of the last gift, so that no later one is meant."""
    if not world.gifts:
        return None
    gift = world.gifts[-1]
    question, answer = rng.choice(
        [
            *[(f"What did {gift.giver} give to {gift.taker}?", gift.thing)] * 2,
            (f"Who gave the {gift.thing}?", gift.giver),
            (f"Who gave the {gift.thing} to {gift.taker}?", gift.giver),
            (f"Who received the {gift.thing}?", gift.taker),
            (f"Who did {gift.giver} give the {gift.thing} to?", gift.taker),
        ]
    )
    return question, answer, (gift.fact,)


def _sides(rng: random.Random) -> Story:
    """Three places in a row; each two neighbours are named, and one of the two pairs is asked about."""
    direction = rng.choice(list(_OPPOSITE))
    row = rng.sample(PLACES, 3)
    pairs = [(row[0], row[1]), (row[1], row[2])]
    rng.shuffle(pairs)
    facts = []
    for first, second in pairs:
        if rng.random() < 0.5:
            facts.append(f"The {first} is {direction} of the {second}.")
        else:
            facts.append(f"The {second} is {_OPPOSITE[direction]} of the {first}.")
    number = rng.randrange(2)
    first, second = pairs[number]
    if rng.random() < 0.5:
        first, second, direction = second, first, _OPPOSITE[direction]
    question, answer = rng.choice(
        [
            (f"What is {direction} of the {second}?", first),
            (f"What is the {first} {direction} of?", second),
        ]
    )
    return Story(tuple(facts), question, answer, (number,))


def read_stories(text: str) -> list[Story]:
    """Of a file of bAbI: a story for each question, with the facts before it.

    Raises:
        ValueError: a line that is none of bAbI's.
    """
    stories, facts, numbers = [], list[str](), dict[str, int]()
    for line in text.splitlines():
        number, _, words = line.partition(" ")
        if int(number) == 1:
            facts, numbers = [], {}
        if "\t" not in words:
            numbers[number] = len(facts)
            facts.append(words)
            continue
        question, answer, support = words.split("\t")
        known = tuple(sorted(numbers[each] for each in support.split()))
        stories.append(Story(tuple(facts), question.strip(), answer, known))
    if not stories:
        raise ValueError("no questions")
    return stories
