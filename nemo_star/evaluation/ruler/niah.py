"""Needles in a haystack: sentences with magic numbers or uuids among essays, noise or other needles.

Source: NVIDIA/RULER, scripts/data/synthetic/niah.py (commit c3f5e3b). Its prompts are equal to these, noise and needles
as haystack offline; with essays, where `split` is NLTK's `sent_tokenize` (see `sentences.split_sentences`) and the file
of essays is the same. A prompt is within 1% under the target, except where it was drawn longer than the one the size
was found with: it is then drawn with 25 sentences (essays: 500 words) less, as there.
"""

from __future__ import annotations

import re
import uuid
from itertools import pairwise

from nemo_star.evaluation.ruler.sources import WordPairs, read_data, word_list
from nemo_star.evaluation.ruler.task import SHORT, RulerFamily, RulerTask
from nemo_star.evaluation.task import Prompt, Setting, framed

NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * place / 39) for place in range(40)]
"""Per cent of the sentences."""
DIGITS = 7


class Niah(RulerFamily):
    """Size: sentences; with essays, words."""

    def __init__(self, task: RulerTask, setting: Setting) -> None:
        super().__init__(task, setting)
        options = task.options
        self.haystack: str = options["haystack"]
        self.kinds: tuple[str, str] = (options["keys"], options["values"])
        self.queries: int = options["num_needle_q"]
        self.keys: int = max(options["num_needle_k"], self.queries)
        self.values: int = options["num_needle_v"]
        self.essays: list[str] = []
        if self.haystack == "essay":
            text = read_data(setting.data, "PaulGrahamEssays.json", lambda data: data["text"])
            self.essays = re.sub(r"\s+", " ", text).split(" ")
        self.pairs = WordPairs(word_list("adjective"), word_list("noun"))
        self.step = 500 if self.essays else 25 if setting.tokens >= SHORT else 5
        self.probe = self.step
        self.smallest = 1 if self.essays else self.keys * self.values
        if self.essays:
            self.most, self.stop_above = len(self.essays), len(self.essays) + self.step

    def answered(self, prompt: Prompt) -> str:
        return " ".join(prompt.outputs)

    def draw(self, size: int, index: int) -> Prompt:
        keys, values, needles = [], [], []
        for _ in range(self.keys):
            keys.append(self._random(self.kinds[0]))
            values.append([self._random(self.kinds[1]) for _ in range(self.values)])
            needles += [self._needle(keys[-1], value) for value in values[-1]]
        self.same_seed().shuffle(needles)
        haystack = self._among_essays(size, needles) if self.essays else self._among_sentences(size, needles)
        asked = self.rng.sample(range(self.keys), self.queries)
        outputs = [value for key in asked for value in values[key]]
        return self._framed(haystack, [keys[key] for key in asked], outputs)

    def _random(self, kind: str) -> str:
        if kind == "numbers":
            return str(self.rng.randint(10 ** (DIGITS - 1), 10**DIGITS - 1))
        if kind == "uuids":
            return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        return self.rng.choice(self.pairs)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=self.kinds[1], key=key, value=value)

    def _among_sentences(self, size: int, needles: list[str]) -> str:
        if self.haystack == "noise":
            sentences = [NOISE] * size
        else:
            sentences = [self._needle(self._random(self.kinds[0]), self._random(self.kinds[1])) for _ in range(size)]
        places = sorted(self.rng.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            sentences.insert(place, needle)
        return "\n".join(sentences)

    def _among_essays(self, size: int, needles: list[str]) -> str:
        words = self.essays
        if not self.task.star_paper:
            words = words * -(-size // len(words))
        sentences = self.setting.split(" ".join(words[:size]).strip())
        depths = self.rng.sample(DEPTHS, len(needles))
        places = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
        parts = []
        for number, (start, stop) in enumerate(pairwise(places)):
            parts.append(" ".join(sentences[start:stop]))
            parts += needles[number : number + 1]
        return " ".join(parts)

    def _framed(self, haystack: str, keys: list[str], outputs: list[str]) -> Prompt:
        query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
        head, tail, kind = self.task.head(), self.task.tail(), self.kinds[1]
        if self.queries * self.values == 1:
            head, tail, kind = singular(head), singular(tail), kind[:-1]
        return framed(head.format(type_needle_v=kind), haystack, tail.format(type_needle_v=kind, query=query), outputs)


def singular(template: str) -> str:
    """A template for one needle, as the official script makes it."""
    return template.replace("Some", "A").replace("are all", "is").replace("are", "is")
