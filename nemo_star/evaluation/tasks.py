"""All tasks by name, and their samples.

task = tasks()["vt"]
for sample in samples(task, tokens=4096, count=5, count_tokens=count): ...
METRICS[task.metric](prediction, sample.outputs, sample.query)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from nemo_star.evaluation import babilong, infinitebench, mrcr_like, openai_mrcr, ruler
from nemo_star.evaluation.sentences import split_sentences
from nemo_star.evaluation.task import Sample, Setting, Task

SEED = 42
"""RULER's and BABILong's."""


def tasks(*, star_paper: bool = False) -> dict[str, Task]:
    """All by name, benchmark by benchmark.

    Args:
        star_paper: RULER's as the code of the Star Attention paper has them (`ruler.tasks`).
    """
    known: dict[str, Task] = {**ruler.tasks(star_paper=star_paper)}
    for benchmark in (babilong, infinitebench, openai_mrcr, mrcr_like):
        known |= benchmark.tasks()
    return known


def samples(
    task: Task,
    *,
    tokens: int,
    count: int,
    seed: int = SEED,
    count_tokens: Callable[[str], int],
    data: Path | None = None,
    split: Callable[[str], list[str]] = split_sentences,
    template_tokens: int = 0,
) -> Iterator[Sample]:
    """Prompts of a task, as long as its haystack allows: prompt and `task.tokens_to_generate` are at most `tokens`.

    Args:
        tokens: the target.
        count: samples.
        count_tokens: tokens of a text, without a beginning-of-text token.
        data: folder with the files that some tasks take.
        split: sentences of an essay or a book; NLTK's `sent_tokenize` makes RULER's prompts.
        template_tokens: that a chat template adds to each prompt; they count within the target.

    Raises:
        ValueError: a file or package that the task takes is missing, says where it is; the target is too short.
    """
    if count < 0 or tokens < 1:
        raise ValueError(f"{count} samples of {tokens} tokens: both must be positive")
    family = task.family(task, Setting(tokens, seed, count_tokens, data, split, template_tokens))
    return (
        Sample(
            id=f"{task.name}-{index}",
            task=task.name,
            context=prompt.context,
            query=prompt.query,
            outputs=prompt.outputs,
            tokens=count_tokens(prompt.text),
        )
        for index, prompt in enumerate(family.prompts(count))
    )
