"""What a RULER task declares, and how its prompts are drawn until they fit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from nemo_star.evaluation.ruler.sizes import draw_sample, find_size
from nemo_star.evaluation.task import Family, Prompt, Task

SHORT = 4096
"""RULER takes smaller steps, and fewer repeated words, below this target."""


@dataclass(frozen=True)
class RulerTask(Task):
    """One of RULER's tasks."""

    star_paper: bool = False
    """Made as the code of the Star Attention paper makes it."""


class RulerFamily(Family):
    """Draws prompts of a size: words, sentences or documents of a haystack.

    `rng` takes the place of the module `random` in the official scripts. Every draw moves it, those that look for the
    size, too, so that prompts are equal only where all draws are made in the same order. The scripts shuffle with
    `same_seed`.
    """

    task: RulerTask
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

    def prompts(self, count: int) -> Iterator[Prompt]:
        size = find_size(self)
        for index in range(count):
            yield draw_sample(self, size, index)
