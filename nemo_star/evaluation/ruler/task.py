"""What a RULER task declares, what its prompts are made from, and what is handed out."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemo_star.evaluation.ruler.sentences import split_sentences
from nemo_star.evaluation.ruler.sizes import draw_sample, find_size

SHORT = 4096
"""RULER takes smaller steps, and fewer repeated words, below this target."""


@dataclass(frozen=True)
class Task:
    """One of RULER's tasks: what makes its prompts and what scores its answers."""

    name: str
    family: Literal["niah", "vt", "cwe", "fwe", "qa"]
    options: Mapping[str, Any]
    """What differs between the tasks of a family."""
    template: str
    """The prompt, with {context} where the haystack goes."""
    answer_prefix: str
    """The answer's first words, which the prompt ends with."""
    tokens_to_generate: int
    metric: Literal["all", "part"]
    """All references are counted, or the best of them."""
    star_paper: bool = False
    """Made as the code of the Star Attention paper makes it."""

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
    """Sentences of essays."""
    template_tokens: int = 0
    """What a chat template puts around each prompt; the scripts' model_template_token."""


class Family(ABC):
    """Draws prompts of a size: words, sentences or documents of a haystack.

    `rng` takes the place of the module `random` in the official scripts. Every draw moves it, those that look for the
    size, too, so that prompts are equal only where all draws are made in the same order.
    """

    probe: int
    """Size of the first draw, from which the largest one is estimated."""
    step: int
    smallest: int = 1
    """No prompt can be drawn below this size."""
    extra: int = 0
    """Tokens that are added to each drawn prompt later."""
    most: int | None = None
    """Star paper's search: the whole haystack."""
    stop_above: int | None = None

    def __init__(self, task: Task, setting: Setting) -> None:
        self.task = task
        self.setting = setting
        self.rng = random.Random(setting.seed)
        self.room = setting.tokens - setting.template_tokens
        self.generate = task.tokens_to_generate

    @abstractmethod
    def draw(self, size: int, index: int) -> Prompt:
        """A prompt of this size for the sample `index`."""

    def final(self, prompt: Prompt) -> Prompt:
        """The prompt as it is handed out."""
        return prompt

    def bound(self, tokens_per_unit: float) -> int:
        """A size that is certainly too large; three times the estimate, because draws differ."""
        return int(self.room / tokens_per_unit * 3)

    def shrink(self, size: int) -> int:
        """The size to try after a prompt that was too long."""
        return size - self.step if size > self.step else size

    def answered(self, prompt: Prompt) -> str:
        """Star paper's search: what is counted behind a prompt."""
        return f" {prompt.outputs}"

    def same_seed(self) -> random.Random:
        """The scripts shuffle with a generator of their seed, made anew each time."""
        return random.Random(self.setting.seed)

    def count(self, text: str) -> int:
        return self.setting.count_tokens(text)

    def prompts(self, count: int) -> Iterator[Prompt]:
        size = find_size(self)
        for index in range(count):
            yield draw_sample(self, size, index)
