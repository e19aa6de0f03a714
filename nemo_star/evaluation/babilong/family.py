"""Facts of a story in their order, at random places of a long text, and the question.

Source: booydar/babilong at commit 7a6efee, babilong/babilong_utils.py and data/create_tasks.py. As there: a fact stands
before any sentence of the background or at its end, whatever their lengths; the last sentence is cut where the length
ends; stories with more facts than an eighth of the tokens are left out; background begins at a random place of a random
book, and its sentences of fewer than 10 tokens are left out.

Unlike there: random numbers are Python's, from the seed (the official ones come from no seed); the length is that of
the whole prompt and answer in the model's tokens, not of the background in GPT-2's; stories are those of bAbI's test
files; a book's line breaks are spaces, and its sentences end by `split_sentences`, not NLTK's Punkt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

from nemo_star.evaluation.babilong.stories import Story, make_story, read_stories
from nemo_star.evaluation.data_files import DataFile
from nemo_star.evaluation.ruler.niah import NOISE
from nemo_star.evaluation.task import Filled, Prompt, Setting, Task, framed

MIN_SENTENCE_TOKENS = 10
MAX_REDRAWS = 1000
"""Of a story that is too long."""
TOKENS_PER_FACT = 8

_FILES = {
    "qa1": "qa1_single-supporting-fact_test.txt",
    "qa2": "qa2_two-supporting-facts_test.txt",
    "qa3": "qa3_three-supporting-facts_test.txt",
    "qa4": "qa4_two-arg-relations_test.txt",
    "qa5": "qa5_three-arg-relations_test.txt",
}
_BABI = (
    "a file of bAbI's tasks_1-20_v1-2/en-10k",
    "github.com/booydar/babilong, in data/tasks_1-20_v1-2.zip; without it: tasks named babilong_..._offline",
)
_BOOKS = DataFile(
    "pg19",
    "a folder with the books of PG-19's test split, a .txt file each",
    "https://storage.googleapis.com/deepmind-gutenberg/, test/ (github.com/google-deepmind/pg19); without it: tasks "
    "named babilong_..._offline",
)


class BabiLong(Filled):
    """Size: words of background."""

    guess = 1000

    def __init__(self, task: Task, setting: Setting) -> None:
        super().__init__(task, setting)
        self.name: str = task.options["stories"]
        self.stories: list[Story] | None = None
        self.books: list[str] = []
        if not task.options["offline"]:
            self.stories = self._read_stories()
            self.books = self._read_books()

    def sample(self, index: int, count: int) -> Callable[[int], Prompt]:
        story = self._story(index, count)
        places = sorted(self.rng.random() for _ in story.facts)
        background, sentences = self._sentences(), list[list[str]]()

        def of_size(size: int) -> Prompt:
            taken, left = list[str](), size
            while left > 0:
                if len(taken) == len(sentences):
                    sentences.append(next(background).split(" "))
                words = sentences[len(taken)][:left]
                taken.append(" ".join(words))
                left -= len(words)
            return self._prompt(story, list(_scattered(story.facts, places, taken)))

        return of_size

    def _prompt(self, story: Story, sentences: Sequence[str]) -> Prompt:
        tail = self.task.tail().format(question=story.question)
        return framed(self.task.head(), " ".join(sentences), tail, [story.answer])

    def _story(self, index: int, count: int) -> Story:
        if self.stories is None:
            made = (make_story(self.name, self.rng) for _ in range(MAX_REDRAWS))
            if (story := next(filter(self._fits, made), None)) is None:
                raise self.too_short()
            return story
        if index == 0:
            self.stories = [story for story in self.stories if self._fits(story)]
            self.rng.shuffle(self.stories)
        if not self.stories:
            raise self.too_short()
        if count > len(self.stories):
            raise ValueError(f"{self.task.name}: {count} samples of {len(self.stories)} questions that fit")
        return self.stories[index]

    def _fits(self, story: Story) -> bool:
        """Without background."""
        room = self.room - self.generate
        return len(story.facts) * TOKENS_PER_FACT <= room and self.count(self._prompt(story, story.facts).text) <= room

    def _sentences(self) -> Iterator[str]:
        """Without end."""
        if not self.books:
            yield from cycle(f"{sentence}." for sentence in NOISE.rstrip(".").split(". "))
        rng = random.Random(self.rng.getrandbits(64))
        while True:
            book = rng.choice(self.books)
            part = book[rng.randrange(len(book)) :][: 10 * self.room]
            for sentence in self.setting.split(part)[1:-1]:
                if self.count(f" {sentence}") >= MIN_SENTENCE_TOKENS:
                    yield sentence

    def _read_stories(self) -> list[Story]:
        return DataFile(_FILES[self.name], *_BABI).read(self.setting.data, read_stories)

    def _read_books(self) -> list[str]:
        folder = _BOOKS.place(self.setting.data)
        texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))]
        books = [book for text in texts if (book := re.sub(r"\s+", " ", text).strip())]
        if not any(self._has_sentences(book) for book in books):
            raise _BOOKS.wrong(folder, "no book with sentences")
        return books

    def _has_sentences(self, book: str) -> bool:
        return any(self.count(f" {each}") >= MIN_SENTENCE_TOKENS for each in self.setting.split(book)[1:-1])


def _scattered(facts: tuple[str, ...], places: list[float], sentences: list[str]) -> Iterator[str]:
    """Facts before sentences, or behind the last one, at these parts of their number, in order."""
    befores = [int(place * (len(sentences) + 1)) for place in places]
    fact = 0
    for number in range(len(sentences) + 1):
        while fact < len(facts) and befores[fact] == number:
            yield facts[fact]
            fact += 1
        yield from sentences[number : number + 1]
