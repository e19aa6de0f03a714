"""A reader of bAbI's sentences (qa1 to qa5), who knows what they say and nothing of the world that made them."""

import re

WENT = re.compile(r"(\w+) (?:went|journeyed|travelled|moved|went back) to the (\w+)\.")
GOT = re.compile(r"(\w+) (?:picked up|got|grabbed|took) the (\w+)(?: there)?\.")
LEFT = re.compile(r"(\w+) (?:left|discarded|dropped|put down) the (\w+)(?: there)?\.")
GAVE = re.compile(r"(\w+) (?:gave|passed|handed) the (\w+) to (\w+)\.")
IS_OF = re.compile(r"The (\w+) is (north|south|east|west) of the (\w+)\.")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


def answer(facts, question):
    """What the facts say, the latest first; None if they do not say it."""
    question = question.strip()
    if match := re.fullmatch(r"Where is (\w+)\?", question):
        return person(facts, match[1])
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        return thing(facts, match[1])
    if match := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
        return before(facts, *match.groups())
    if "give" in question or "gave" in question or "received" in question:
        return gift(facts, question)
    return side(facts, question)


def person(facts, name):
    for fact in reversed(facts):
        if (went := WENT.fullmatch(fact)) and went[1] == name:
            return went[2]
    return None


def thing(facts, name):
    """Looks back for who had it last."""
    for number in reversed(range(len(facts))):
        if (got := GOT.fullmatch(facts[number])) and got[2] == name:
            return person(facts, got[1])
        if (left := LEFT.fullmatch(facts[number])) and left[2] == name:
            return person(facts[:number], left[1])
        if (gave := GAVE.fullmatch(facts[number])) and gave[2] == name:
            return person(facts, gave[3])
    return None


def before(facts, name, place):
    """Where it was after each fact, and what stood before the last time it came to the place."""
    places = [found for number in range(len(facts)) if (found := thing(facts[: number + 1], name))]
    changes = [found for number, found in enumerate(places) if number == 0 or found != places[number - 1]]
    for number in reversed(range(1, len(changes))):
        if changes[number] == place:
            return changes[number - 1]
    return None


def gift(facts, question):
    asked = {
        r"What did (?P<giver>\w+) give to (?P<taker>\w+)\?": "what",
        r"Who gave the (?P<what>\w+)\?": "giver",
        r"Who gave the (?P<what>\w+) to (?P<taker>\w+)\?": "giver",
        r"Who received the (?P<what>\w+)\?": "taker",
        r"Who did (?P<giver>\w+) give the (?P<what>\w+) to\?": "taker",
    }
    ((match, wanted),) = [(match, wanted) for form, wanted in asked.items() if (match := re.fullmatch(form, question))]
    for fact in reversed(facts):
        if gave := GAVE.fullmatch(fact):
            said = dict(zip(("giver", "what", "taker"), gave.groups(), strict=True))
            if all(said[role] == word for role, word in match.groupdict().items()):
                return said[wanted]
    return None


def side(facts, question):
    said = set()
    for fact in facts:
        first, direction, second = IS_OF.fullmatch(fact).groups()
        said |= {(first, direction, second), (second, OPPOSITE[direction], first)}
    if match := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
        found = {first for first, direction, second in said if (direction, second) == match.groups()}
    else:
        match = re.fullmatch(r"What is the (\w+) (\w+) of\?", question)
        found = {second for first, direction, second in said if (first, direction) == match.groups()}
    return found.pop() if len(found) == 1 else None
