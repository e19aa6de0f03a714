"""openai/mrcr: recorded conversations in which the same thing is asked for two, four or eight times.

Source: the data set huggingface.co/datasets/openai/mrcr (MIT), whose rows are read from the folder `data`; the score is
that of its card. Unlike there: a conversation is one text ("User: ...", "Assistant: ..."), and tokens are the model's.
Of a length are the rows, in their order, that fit into it and not into half of it, as in the data set's bins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from nemo_star.evaluation.data_files import DataFile
from nemo_star.evaluation.task import Family, Prompt, Setting, Task, framed

_FILE = DataFile(
    "mrcr.jsonl",
    'openai/mrcr, a JSON line {"prompt", "answer", "n_needles"} for each row',
    "huggingface.co/datasets/openai/mrcr: pandas.read_parquet(...).to_json(..., orient='records', lines=True)",
)
_NAMES = {"user": "User", "assistant": "Assistant"}


@dataclass(frozen=True)
class _Row:
    needles: int
    conversation: str
    """All turns but the last one."""
    question: str
    answer: str


class Recorded(Family):
    """Rows of the file, as they are."""

    def __init__(self, task: Task, setting: Setting) -> None:
        super().__init__(task, setting)
        self.rows = [row for row in _FILE.read(setting.data, _rows) if row.needles == task.options["needles"]]

    def prompts(self, count: int) -> Iterator[Prompt]:
        found = 0
        for row in self.rows if count else ():
            tail = self.task.tail().format(question=row.question)
            prompt = framed(self.task.head(), row.conversation, tail, [row.answer])
            if self.room < 2 * (self.count(prompt.text) + self.generate) <= 2 * self.room:
                yield prompt
                found += 1
                if found == count:
                    return
        if found < count:
            raise ValueError(
                f"{self.task.name}: {_FILE.name} has {found} rows of {self.room // 2} to {self.room} tokens, {count} "
                "are asked for: set samples"
            )


def _rows(text: str) -> list[_Row]:
    rows = []
    for line in filter(None, text.split("\n")):
        fields = json.loads(line)
        *turns, last = json.loads(fields["prompt"])
        if last["role"] != "user":
            raise ValueError("a prompt that ends in no question")
        said = "\n\n".join(f"{_NAMES[turn['role']]}: {turn['content']}" for turn in turns)
        rows.append(_Row(int(fields["n_needles"]), said, last["content"], fields["answer"]))
    return rows


def tasks() -> dict[str, Task]:
    """With two, four and eight needles."""
    made = [
        Task(
            name=f"mrcr_{needles}",
            family=Recorded,
            options=MappingProxyType({"needles": needles}),
            template="{context}\n\nUser: {question}\n\nAssistant:",
            answer_prefix="",
            tokens_to_generate=1024,
            metric="prefixed_ratio",
        )
        for needles in (2, 4, 8)
    ]
    return {task.name: task for task in made}
