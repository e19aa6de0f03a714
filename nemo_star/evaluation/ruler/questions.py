"""Question answering: SQuAD's or HotpotQA's question, its documents among others.

Source: NVIDIA/RULER, scripts/data/synthetic/qa.py (commit c3f5e3b). Its prompts are equal to these with the same files.
Documents are of different lengths and their number is found with the first question: prompts can be some per cent
under the target, as there.

With `star_paper` as in NVIDIA/Star-Attention, ruler/data/synthetic/qa.py (commit c61059f): SQuAD's documents are there
five times, because all of them are fewer tokens than long targets, and no document is repeated beyond that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_star.evaluation.ruler.sources import read_data
from nemo_star.evaluation.ruler.task import RulerFamily, RulerTask
from nemo_star.evaluation.task import Prompt, Setting, framed


@dataclass(frozen=True)
class Question:
    """A question and the numbers of its documents."""

    text: str
    outputs: list[str]
    documents: list[int]
    more: list[int]
    """SQuAD: the other paragraphs of the article, which are taken before strange ones."""


class Questions(RulerFamily):
    """Size: documents."""

    step = probe = 10

    def __init__(self, task: RulerTask, setting: Setting) -> None:
        super().__init__(task, setting)
        dataset: str = task.options["dataset"]
        read = _squad if dataset == "squad" else _hotpotqa
        self.documents, self.questions = read_data(setting.data, f"{dataset}.json", read)
        if task.star_paper and dataset == "squad":
            self.documents = self.documents * 5
        self.most = self.stop_above = len(self.documents)

    def prompts(self, count: int) -> Iterator[Prompt]:
        if count > len(self.questions):
            raise ValueError(f"{self.task.name}: {count} samples of {len(self.questions)} questions")
        return super().prompts(count)

    def draw(self, size: int, index: int) -> Prompt:
        question = self.questions[index]
        documents = self._chosen(question, size)
        self.same_seed().shuffle(documents)
        text = "\n\n".join(f"Document {number}:\n{document}" for number, document in enumerate(documents, 1))
        return framed(self.task.head(), text, self.task.tail().format(query=question.text), question.outputs)

    def _chosen(self, question: Question, size: int) -> list[str]:
        total, room = len(self.documents), size - len(question.documents)
        if size >= total:
            if self.task.star_paper:
                return self.documents  # shuffled in place there, too
            return (self.documents * -(-size // total))[:size]
        if room < 0:
            raise ValueError(
                f"{self.task.name}: the {len(question.documents)} documents of {question.text!r} do not fit; "
                "give more tokens"
            )
        known = {*question.documents, *question.more}
        if room > len(question.more):
            others = [number for number in range(total) if number not in known]
            numbers = question.documents + question.more + self.rng.sample(others, room - len(question.more))
        else:
            numbers = question.documents + self.rng.sample(question.more, room)
        return [self.documents[number] for number in numbers]


def _squad(data: Any) -> tuple[list[str], list[Question]]:
    articles = [article["paragraphs"] for article in data["data"]]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article})
    number = {document: index for index, document in enumerate(documents)}
    questions = []
    for article in articles:
        paragraphs = [number[paragraph["context"]] for paragraph in article]
        for own, paragraph in zip(paragraphs, article, strict=True):
            more = [other for other in paragraphs if other != own]
            for asked in paragraph["qas"]:
                if not asked["is_impossible"]:
                    outputs = [answer["text"] for answer in asked["answers"]]
                    questions.append(Question(asked["question"], outputs, [own], more))
    return documents, questions


def _hotpotqa(data: Any) -> tuple[list[str], list[Question]]:
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]] for row in data]
    documents = sorted({text for row in texts for text in row})
    number = {document: index for index, document in enumerate(documents)}
    questions = [
        Question(row["question"], [row["answer"]], [number[text] for text in own], [])
        for row, own in zip(data, texts, strict=True)
    ]
    return documents, questions
