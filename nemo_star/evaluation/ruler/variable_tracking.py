"""Variable tracking: one chain of assignments in noise, after an example that is answered.

Source: NVIDIA/RULER, scripts/data/synthetic/variable_tracking.py (commit c3f5e3b), with noise as there; its prompts are
equal to these. Should two variables of a chain be equal, which the official script fails at, the second one is left
out. A prompt is within 1% under the target, except where it was drawn longer than the one the size was found with: it
is then drawn with 10 noises less.

With `star_paper` as in NVIDIA/Star-Attention, ruler/data/synthetic/variable_tracking.py (commit c61059f): line breaks
of the noise and the example's place differ, the example's value stays, the prefix has "assgined".
"""

from __future__ import annotations

import string
from itertools import pairwise
from typing import TYPE_CHECKING

from nemo_star.evaluation.ruler.niah import NOISE
from nemo_star.evaluation.ruler.sizes import draw_sample, find_size
from nemo_star.evaluation.ruler.task import SHORT, RulerFamily, RulerTask
from nemo_star.evaluation.task import Prompt, Setting, framed

if TYPE_CHECKING:
    from numpy.random import RandomState

SHOT_TOKENS = 500
SHOT_VALUE = "12345"


class Assignments(RulerFamily):
    """Size: noises. One chain of `num_hops` + 1 variables."""

    def __init__(self, task: RulerTask, setting: Setting, values: RandomState, *, shot: bool) -> None:
        super().__init__(task, setting)
        self.numbers = values
        self.shot = shot
        self.variables: int = task.options["num_hops"] + 1
        self.smallest = 1 if task.star_paper else self.variables

    def draw(self, size: int, index: int) -> Prompt:
        names = self._names()
        star = self.task.star_paper
        value = SHOT_VALUE if self.shot and not star else str(self.numbers.randint(10000, 99999))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
        sentences = [NOISE + "\n" if star else NOISE] * size
        if star and size <= len(chain):
            sentences = [part + "." if part.strip() else part for noise in sentences for part in noise.split(".")]
        places = sorted(self.rng.sample(range(len(sentences)), len(chain)))
        for number, place in enumerate(places):
            sentences.insert(place + number, chain[number])
        text = (" " if star else "\n").join(sentences).replace(". \n", ".\n")
        return framed(self.task.head(), text, self.task.tail().format(query=value, num_v=self.variables), names)

    def _names(self) -> list[str]:
        letters = 3 if self.shot else 5
        names = [self._name(letters) for _ in range(self.variables)]
        while len(set(names)) < self.variables:
            names.append(self._name(letters))
        return list(dict.fromkeys(names))

    def _name(self, letters: int) -> str:
        return "".join(self.rng.choices(string.ascii_uppercase, k=letters))


class VariableTracking(Assignments):
    """Chains behind a short example, whose names are drawn anew for each prompt."""

    def __init__(self, task: RulerTask, setting: Setting) -> None:
        from numpy.random import RandomState  # NumPy promises that its numbers never change

        super().__init__(task, setting, RandomState(setting.seed), shot=False)
        self.step = self.probe = 10 if setting.tokens >= SHORT or task.star_paper else 5
        self.example = self._make_example()
        self.extra = self.count(self.example)

    def final(self, prompt: Prompt) -> Prompt:
        example = self._renamed()
        if self.task.star_paper:
            return Prompt(f" {example}\n\n{prompt.context}", prompt.query, prompt.outputs)
        example = example.replace(SHOT_VALUE, str(self.numbers.randint(10000, 99999)))
        return Prompt(f"{example}\n{prompt.context}", prompt.query, prompt.outputs)

    def shrink(self, size: int) -> int:
        return size if self.task.star_paper else super().shrink(size)

    def _make_example(self) -> str:
        """An answered prompt of at most 500 tokens; the same random numbers go on."""
        star = self.task.star_paper
        family = Assignments(self.task, self.setting, self.numbers, shot=True)
        family.rng, family.step, family.probe = self.rng, 5, 5
        family.room = SHOT_TOKENS - self.setting.template_tokens
        family.generate = self.generate if star else 0
        self.names = (prompt := draw_sample(family, find_size(family), 0)).outputs
        return f"{prompt.text} {' '.join(self.names)}\n" + ("\n" if star else "")

    def _renamed(self) -> str:
        example = self.example
        for name in self.names:
            example = example.replace(name, self._name(len(name)))
        return example
