"""The world of bAbI's stories: who is where, who holds what, and what has been said of it.

Source: the rules of facebookarchive/bAbI-tasks at commit ccd8fd6, lua/babi/actions.lua and
lua/babi/tasks/worlds/world_basic.txt: who moves was elsewhere, what is picked up lies where they are, what is left or
given was held, and a gift needs both in one place. Where all are at first is not said. The sentences are those of
the data set (tasks_1-20_v1-2/en-10k), which an older program made.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_star.evaluation.metrics import PLACES

OBJECTS = ("apple", "football", "milk")

_MOVED = ("went to", "journeyed to", "travelled to", "went back to", "moved to")
_GOT = ("picked up", "got", "grabbed", "took")
_LEFT = ("left", "discarded", "dropped", "put down")
_GAVE = ("passed", "gave", "handed")
_MOVES = 0.6
"""The part of facts that are moves at least; about what the data set has."""
_LEFT_THERE = 0.2
"""Of what is left, the part after which "there" is said."""


@dataclass(frozen=True)
class Known:
    """What a reader can say of an object, and the numbers of the facts that say it."""

    place: str
    facts: tuple[int, ...]


@dataclass(frozen=True)
class Gift:
    """Who gave what to whom, and the number of the fact."""

    giver: str
    thing: str
    taker: str
    fact: int


class World:
    """Moves on by one fact at a time.

    Args:
        people: all actors.
        objects: what can be carried.
        gifts: whether they give objects to each other.
        got_there: of what is picked up, the part after which "there" is said.
    """

    def __init__(
        self,
        rng: random.Random,
        people: Sequence[str],
        *,
        objects: Sequence[str] = OBJECTS,
        gifts: bool = False,
        got_there: float = 1.0,
    ) -> None:
        self._rng = rng
        self._people = people
        self._with_gifts = gifts
        self._got_there = got_there
        self.facts: list[str] = []
        self.where = {person: rng.choice(PLACES) for person in people}
        self.told: dict[str, int] = {}
        """The fact that says where a person is."""
        self.carried: dict[str, tuple[str, Known]] = {}
        """Of an object: the place a reader saw it carried to last, where it was before, the facts that say so."""
        self.gifts: list[Gift] = []
        self.objects = objects
        self._lies = {thing: rng.choice(PLACES) for thing in objects}
        self._holder: dict[str, str] = {}
        self._handled: dict[str, int] = {}
        """The last fact that names an object."""
        self._left: dict[str, Known] = {}

    def advance(self) -> None:
        """Somebody moves, or one of all the things that can be done with objects is done."""
        handlings = self._handlings()
        if not handlings or self._rng.random() < _MOVES:
            self._move()
            return
        person, thing, taker = self._rng.choice(handlings)
        if thing not in self._holder:
            self._get(person, thing)
        elif taker is None:
            self._leave(person, thing)
        else:
            self._give(person, thing, taker)

    def place_of(self, thing: str) -> str:
        """Where it is, said or not."""
        return self.where[self._holder[thing]] if thing in self._holder else self._lies[thing]

    def known(self, thing: str) -> Known | None:
        """Where a reader knows it to be: where it was left, or with who has it."""
        holder = self._holder.get(thing)
        if holder is None:
            return self._left.get(thing)
        if holder not in self.told:
            return None
        return Known(self.where[holder], (self._handled[thing], self.told[holder]))

    def _handlings(self) -> list[tuple[str, str, str | None]]:
        """Who can get, leave or give an object, and to whom."""
        found: list[tuple[str, str, str | None]] = []
        for thing in self.objects:
            here = [person for person in self._people if self.where[person] == self.place_of(thing)]
            if thing not in self._holder:
                found += [(person, thing, None) for person in here]
                continue
            holder = self._holder[thing]
            found.append((holder, thing, None))
            if self._with_gifts:
                found += [(holder, thing, person) for person in here if person != holder]
        return found

    def _move(self) -> None:
        person = self._rng.choice(self._people)
        place = self._rng.choice([place for place in PLACES if place != self.where[person]])
        for thing in [thing for thing, holder in self._holder.items() if holder == person]:
            if (known := self.known(thing)) is not None:
                self.carried[thing] = (place, Known(known.place, (*known.facts, len(self.facts))))
        self.where[person] = place
        self.told[person] = self._say(f"{person} {self._rng.choice(_MOVED)} the {place}")

    def _get(self, person: str, thing: str) -> None:
        self._holder[thing] = person
        there = " there" if self._rng.random() < self._got_there else ""
        self._handled[thing] = self._say(f"{person} {self._rng.choice(_GOT)} the {thing}{there}")

    def _leave(self, person: str, thing: str) -> None:
        del self._holder[thing]
        self._lies[thing] = self.where[person]
        there = " there" if self._rng.random() < _LEFT_THERE else ""
        self._handled[thing] = self._say(f"{person} {self._rng.choice(_LEFT)} the {thing}{there}")
        self._left.pop(thing, None)
        if person in self.told:
            self._left[thing] = Known(self.where[person], (self._handled[thing], self.told[person]))

    def _give(self, person: str, thing: str, taker: str) -> None:
        self._holder[thing] = taker
        self._handled[thing] = self._say(f"{person} {self._rng.choice(_GAVE)} the {thing} to {taker}")
        self.gifts.append(Gift(person, thing, taker, self._handled[thing]))

    def _say(self, words: str) -> int:
        """The fact's number, from 0."""
        self.facts.append(f"{words}.")
        return len(self.facts) - 1
