"""A conversation in which the same thing is asked for several times: the answer to the i-th is to be repeated.

Like openai/mrcr, after Michelangelo (arXiv 2409.12640): two, four or eight equal requests ("write a poem about tapirs")
among others of the same kind, the question and the preface to the letter, the score that of the data set's card (MIT).
Unlike it: what the assistant writes comes from a small grammar and is short, not from GPT-4o, and the conversation is
one text. Scores are not comparable with openai/mrcr's; who repeats the wrong poem gets 8 of 100 points on average.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from types import MappingProxyType

from nemo_star.evaluation.task import Filled, Prompt, Task, framed

SENTENCES = 6
"""Of a writing."""
PREFIX_LETTERS = 10

_FORMS = (
    "poem",
    "short story",
    "blog post",
    "social media post",
    "news article",
    "riddle",
    "song",
    "letter",
    "speech",
    "scene in a play",
)
_TOPICS = """
tapirs rocks rivers lanterns bridges violins clouds markets gardens harbors foxes stamps kites mirrors orchards
glaciers beetles castles canals ladders comets herons candles meadows puzzles turtles windmills sparrows islands maps
""".split()
_ADJECTIVES = """
ancient brave calm careful clever curious distant eager faithful fragile gentle golden hidden humble lively lonely
mellow modest noisy patient pale proud quiet restless rough silver simple sleepy slender solemn steady stubborn tender
tired vivid warm weary wild wise
""".split()
_PLACES = """
village valley library station square forest museum workshop theater bakery tower cellar courtyard attic lighthouse
school chapel quarry stable tavern
""".split()
_TIMES = "dawn noon dusk midnight breakfast supper winter spring summer autumn harvest sunrise".split()
_VERBS = """
waited vanished returned gathered whispered danced slept wandered shimmered trembled laughed rested argued marched
drifted glowed
""".split()
_TEMPLATES = (
    "The {topic} of the {adjective} {place} {verb} before {time}.",
    "No one in the {place} could say why the {topic} were so {adjective}.",
    "At {time} the {adjective} {topic} {verb} behind the {place}.",
    "Every {time} there were {adjective} {topic} near the {place}.",
    "After {time} the {topic} {verb}, and the {place} felt {adjective}.",
    "Between the {place} and the {place2} the {topic} {verb} until {time}.",
    "It was the {adjective} {place} that the {topic} remembered at {time}.",
    "Some {topic} {verb}, others stayed {adjective} in the {place2}.",
)
_PREFACE = "Here are some examples of conversations succeeded by a follow-up question answered correctly:"
_QUESTION = "Prepend {prefix} to the {number} (1 indexed) {subject}. Do not include any other text in your response."
_ORDINALS = ("1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th")

Request = tuple[str, str]
"""Form and topic."""


class Conversation(Filled):
    """Size: sentences of the writings that are not asked for."""

    def sample(self, index: int, count: int) -> Callable[[int], Prompt]:
        needles: int = self.task.options["needles"]
        asked = (self.rng.choice(_FORMS), self.rng.choice(_TOPICS))
        wanted = [_write(asked[1], self.rng) for _ in range(needles)]
        places = sorted(self.rng.random() for _ in range(needles))
        number, prefix = self.rng.randrange(needles), _prefix(self.rng)
        example, others = _example(self.rng), _others(asked, random.Random(self.rng.getrandbits(64)))
        drawn: list[tuple[Request, list[str]]] = []

        def of_size(size: int) -> Prompt:
            while len(drawn) * SENTENCES < size:
                drawn.append(next(others))
            turns = [
                _turn(request, sentences[: size - turn * SENTENCES])
                for turn, (request, sentences) in enumerate(drawn)
                if turn * SENTENCES < size
            ]
            befores = [int(place * (len(turns) + 1)) for place in places]
            for later, (before, sentences) in enumerate(zip(befores, wanted, strict=True)):
                turns.insert(before + later, _turn(asked, sentences))
            tail = self.task.tail().format(question=_question(asked, number, prefix))
            return framed(self.task.head(), "\n\n".join([example, *turns]), tail, [prefix + " ".join(wanted[number])])

        return of_size


def _write(topic: str, rng: random.Random) -> list[str]:
    """Sentences."""
    return [
        rng.choice(_TEMPLATES).format(
            topic=topic,
            adjective=rng.choice(_ADJECTIVES),
            place=rng.choice(_PLACES),
            place2=rng.choice(_PLACES),
            time=rng.choice(_TIMES),
            verb=rng.choice(_VERBS),
        )
        for _ in range(SENTENCES)
    ]


def _others(asked: Request, rng: random.Random) -> Iterator[tuple[Request, list[str]]]:
    """Other requests without end, every other one with the form or the topic that is asked for."""
    while True:
        form, topic = rng.choice(_FORMS), rng.choice(_TOPICS)
        form, topic = rng.choice([(form, topic), (form, topic), (asked[0], topic), (form, asked[1])])
        if (form, topic) != asked:
            yield (form, topic), _write(topic, rng)


def _turn(request: Request, sentences: list[str]) -> str:
    return f"User: write a {request[0]} about {request[1]}\nAssistant: {' '.join(sentences)}"


def _question(request: Request, number: int, prefix: str) -> str:
    return _QUESTION.format(prefix=prefix, number=_ORDINALS[number], subject=f"{request[0]} about {request[1]}")


def _prefix(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits, k=PREFIX_LETTERS))


def _example(rng: random.Random) -> str:
    """A conversation of three requests and an answered question."""
    asked, other = ("poem", "balloons"), ("riddle", "balloons")
    written = [_write(topic, rng) for _, topic in (asked, other, asked)]
    prefix = _prefix(rng)
    turns = [_turn(request, sentences) for request, sentences in zip((asked, other, asked), written, strict=True)]
    answered = f"User: {_question(asked, 1, prefix)}\nAssistant: {prefix}{' '.join(written[2])}"
    return "\n\n".join(["======EXAMPLE======", *turns, answered, "======END EXAMPLE======"])


def tasks() -> dict[str, Task]:
    """With two, four and eight needles."""
    made = [
        Task(
            name=f"mrcr_like_{needles}",
            family=Conversation,
            options=MappingProxyType({"needles": needles}),
            template=f"{_PREFACE}\n\n{{context}}\n\nUser: {{question}}\nAssistant:",
            answer_prefix="",
            tokens_to_generate=192,
            metric="prefixed_ratio",
        )
        for needles in (2, 4, 8)
    ]
    return {task.name: task for task in made}
