"""What a task declares, what its prompts are made from, and what is handed out."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_star.evaluation.fill import fill
from nemo_star.evaluation.sentences import split_sentences


@dataclass(frozen=True)
class Task:
    """What makes a task's prompts and what scores its answers."""

    name: str
    family: Callable[[Any, Setting], Family]
    """Of tasks that are made alike: called with the task and the setting."""
    options: Mapping[str, Any]
    """What differs between the tasks of a family."""
    template: str
    """The prompt, with {context} where the haystack goes."""
    answer_prefix: str
    """The answer's first words, which the prompt ends with."""
    tokens_to_generate: int
    metric: str
    """A name of `metrics.METRICS`."""

    def head(self) -> str:
        """The prompt before the haystack."""
        return self.template.partition("{context}")[0]

    def tail(self) -> str:
        """The prompt after the haystack, with the line breaks that belong to the context."""
        return self.template.partition("{context}")[2] + self.answer_prefix


@dataclass(frozen=True)
class Sample:
    """One question: `context` + `query` is the whole prompt, without a chat template."""

    id: str
    task: str
    context: str
    """Ends with the line break after the haystack, as in the code of the Star Attention paper."""
    query: str
    """The question with the answer prefix."""
    outputs: list[str]
    """References."""
    tokens: int
    """Those of context + query; the tokens to generate come on top."""


@dataclass(frozen=True)
class Prompt:
    """A drawn prompt and its references."""

    context: str
    query: str
    outputs: list[str]

    @property
    def text(self) -> str:
        return self.context + self.query


def framed(head: str, haystack: str, tail: str, outputs: list[str]) -> Prompt:
    """A prompt cut after the line breaks that follow the haystack."""
    query = tail.lstrip("\n")
    return Prompt(head + haystack + tail[: len(tail) - len(query)], query, outputs)


@dataclass(frozen=True)
class Setting:
    """What a user asks for."""

    tokens: int
    """Target: tokens of a prompt, tokens to generate, and those of a chat template."""
    seed: int
    count_tokens: Callable[[str], int]
    data: Path | None
    split: Callable[[str], list[str]] = field(default=split_sentences)
    """Sentences of essays and books."""
    template_tokens: int = 0
    """What a chat template puts around each prompt; RULER's model_template_token."""


class Family(ABC):
    """Makes the prompts of a task; all random numbers come from `rng`."""

    def __init__(self, task: Task, setting: Setting) -> None:
        self.task = task
        self.setting = setting
        self.rng = random.Random(setting.seed)
        self.room = setting.tokens - setting.template_tokens
        self.generate = task.tokens_to_generate

    @abstractmethod
    def prompts(self, count: int) -> Iterator[Prompt]:
        """This many prompts, each with the tokens to generate at most as long as the target."""

    def same_seed(self) -> random.Random:
        """A generator of the same seed, made anew each time."""
        return random.Random(self.setting.seed)

    def count(self, text: str) -> int:
        return self.setting.count_tokens(text)

    def too_short(self) -> ValueError:
        return ValueError(
            f"{self.task.name}: the smallest haystack and {self.generate} tokens to generate do not fit into "
            f"{self.room} tokens; give more tokens"
        )


class Filled(Family):
    """Draws a sample once, then gives it as much haystack as fits."""

    smallest: int = 0
    """No prompt can be made below this size."""
    guess: int = 64
    """The size that is tried first."""
    most: int | None = None
    """No prompt can be made above this size."""

    @abstractmethod
    def sample(self, index: int, count: int) -> Callable[[int], Prompt]:
        """Of sample `index` of `count`: its prompt with a haystack of any size."""

    def prompts(self, count: int) -> Iterator[Prompt]:
        """Within 1% under the target, where the units of the haystack are small enough."""
        size = self.guess
        for index in range(count):
            size, prompt = self.filled(self.sample(index, count), size)
            yield prompt

    def filled(self, of_size: Callable[[int], Prompt], guess: int) -> tuple[int, Prompt]:
        """The largest size that fits, or nearly, and its prompt.

        Raises:
            ValueError: the smallest one does not fit.
        """
        made: dict[int, Prompt] = {}

        def tokens_of(size: int) -> int:
            made[size] = of_size(size)
            return self.count(made[size].text)

        room = self.room - self.generate
        size = fill(tokens_of, room=room, guess=guess, smallest=self.smallest, most=self.most)
        if size is None:
            raise self.too_short()
        return size, made[size]
