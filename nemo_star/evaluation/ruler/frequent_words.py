"""Frequent words: of coded words whose numbers fall by Zipf's law, the three most frequent ones.

Source: NVIDIA/RULER, scripts/data/synthetic/freq_words_extraction.py (commit c3f5e3b). Its prompts are equal to these.
Lengths come in steps of 1/32 of the target, and the number of words is found with one vocabulary, whose words can be
fewer tokens than those of the next one: a prompt can be 3% under the target, with a tokenizer that cuts coded words
into pieces of different lengths 15%, as there.

With `star_paper` as in NVIDIA/Star-Attention, ruler/data/synthetic/freq_words_extraction.py and
ruler/synthetic_inference_config.yaml (commit c61059f): 120 tokens are generated, and the context alone is held against
the target, so that a prompt can be longer than it.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator

from nemo_star.evaluation.ruler.task import RulerFamily, RulerTask
from nemo_star.evaluation.task import Prompt, Setting, framed

LETTERS = 6
ALPHA = 2.0
ZETA = math.pi**2 / 6
"""Riemann's zeta at ALPHA, the only exponent of RULER's tasks; the double that scipy.special.zeta(2.0) gives."""
NOISE = "..."
ANSWERS = 3


class FrequentWords(RulerFamily):
    """Size: words before their numbers are rounded down."""

    def __init__(self, task: RulerTask, setting: Setting) -> None:
        super().__init__(task, setting)
        self.limit = self.room - (0 if task.star_paper else self.generate)
        self.step = self.limit // 32
        if self.limit // 50 <= ANSWERS:
            raise ValueError(f"{task.name}: {setting.tokens} tokens are too few for {ANSWERS} answers; give more")

    def draw(self, size: int, index: int) -> Prompt:
        return self._prompt(self._vocabulary(), size)

    def prompts(self, count: int) -> Iterator[Prompt]:
        """Each shrinks from the size that was found first."""
        vocabulary, found = self._vocabulary(), self.limit // LETTERS
        while self._counted(self._prompt(vocabulary, found)) < self.limit:
            found += self.step
        found -= self.step
        for _ in range(count):
            vocabulary, size = self._vocabulary(), found
            while self._counted(prompt := self._prompt(vocabulary, size)) > self.limit:
                size -= self.step
                if size <= 0:
                    break
            if not set(prompt.outputs) <= set(prompt.context.split()):
                raise ValueError(f"{self.task.name}: the words do not fit into {self.room} tokens; give more tokens")
            yield prompt

    def _counted(self, prompt: Prompt) -> int:
        return self.count(prompt.context if self.task.star_paper else prompt.text)

    def _vocabulary(self) -> list[str]:
        size = self.limit // 50
        words = [self._word() for _ in range(size)]
        while len(set(words)) < size:
            words.append(self._word())
        words = sorted(set(words))
        self.same_seed().shuffle(words)
        return [NOISE, *words[1:]]

    def _word(self) -> str:
        return "".join(self.rng.choices(string.ascii_lowercase, k=LETTERS))

    def _prompt(self, vocabulary: list[str], size: int) -> Prompt:
        text = []
        for rank, word in enumerate(vocabulary, 1):
            text += [word] * int(size * rank**-ALPHA / ZETA)
        self.same_seed().shuffle(text)
        return framed(self.task.head(), " ".join(text), self.task.tail(), vocabulary[1 : 1 + ANSWERS])
