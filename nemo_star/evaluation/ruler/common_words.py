"""Common words: of a numbered list, the ten that are repeated most often, after an example that is answered.

Source: NVIDIA/RULER, scripts/data/synthetic/common_words_extraction.py (commit c3f5e3b). Its prompts are equal to
these. Where the search for the size comes across more words than wonderwords has (some 9,000: targets of about 64
thousand tokens and more), it takes english_words.json from `data`. A word more is three places in the list (below 4,096
tokens one), a prompt too long by a token is drawn with ten words less: 1% under the target is kept at long targets
only. A target at which ten words hardly fit is an error; the official script draws until short words come.

With `star_paper` as in NVIDIA/Star-Attention, ruler/synthetic_task_config.yaml and
ruler/data/synthetic/common_words_extraction.py (commit c61059f): repeated 300 and 30 times, hence for targets of 16
thousand tokens and more; the example's answer follows its query without a space.
"""

from __future__ import annotations

from nemo_star.evaluation.ruler.sources import read_data, word_list
from nemo_star.evaluation.ruler.task import SHORT, RulerFamily, RulerTask
from nemo_star.evaluation.task import Prompt, Setting, framed

PROBE = 4096


class CommonWords(RulerFamily):
    """Size: different words."""

    step = 10
    probe = PROBE

    def __init__(self, task: RulerTask, setting: Setting) -> None:
        super().__init__(task, setting)
        self.common: int = task.options["num_cw"]
        self.smallest = self.common
        self.repeats: tuple[int, int] = (task.options["freq_cw"], task.options["freq_ucw"])
        self.shot = (40, 10, 3)
        if setting.tokens < SHORT:
            self.repeats, self.shot = (6, 1), (20, 3, 1)
        self.words = sorted({*word_list("noun"), *word_list("adjective"), *word_list("verb")})
        self.same_seed().shuffle(self.words)
        self.more_words: list[str] = []
        self.most = self.stop_above = len(self.words)

    def bound(self, tokens_per_unit: float) -> int:
        return int(self.room // tokens_per_unit) * 2

    def answered(self, prompt: Prompt) -> str:
        return " " + _numbered(prompt.outputs)

    def draw(self, size: int, index: int) -> Prompt:
        star, head, tail = self.task.star_paper, self.task.head(), self.task.tail()
        listed, answer = self._list(*self.shot)
        example = f"{head}{listed}{tail}{'' if star else ' '}{_numbered(answer)}\n"
        listed, common = self._list(size, *self.repeats)
        return framed(example + head, listed, tail, common)

    def _list(self, size: int, repeats: int, others: int) -> tuple[str, list[str]]:
        drawn = self.rng.sample(self._enough(size), size)
        common, uncommon = drawn[: self.common], drawn[self.common :]
        listed = common * repeats + uncommon * others
        self.same_seed().shuffle(listed)
        return _numbered(listed), common

    def _enough(self, size: int) -> list[str]:
        if size <= len(self.words):
            return self.words
        if not self.more_words:
            self.more_words = read_data(self.setting.data, "english_words.json", lambda data: list(data.values()))
        return self.more_words


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
