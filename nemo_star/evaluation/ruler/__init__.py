"""RULER (arXiv 2404.06654): its 13 tasks, their prompts and scores.

    task = tasks()["vt"]
    for sample in samples(task, tokens=4096, count=5, count_tokens=count): ...
    score(task, predictions, references)

Prompts are equal to those of the official scripts (github.com/NVIDIA/RULER, commit c3f5e3b) with their template `base`,
for the same seed, tokenizer and wonderwords release; each family's file names what can differ. A chat template stands
around them later (`evaluation/chat.py`); its tokens are left free, as by the scripts' `--model_template_token`. Where
the scripts write the template into the prompts themselves (`--model_template_type`), it is around cwe's example, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nemo_star.evaluation.ruler import metrics
from nemo_star.evaluation.ruler.catalog import tasks
from nemo_star.evaluation.ruler.common_words import CommonWords
from nemo_star.evaluation.ruler.frequent_words import FrequentWords
from nemo_star.evaluation.ruler.niah import Niah
from nemo_star.evaluation.ruler.questions import Questions
from nemo_star.evaluation.ruler.sentences import split_sentences
from nemo_star.evaluation.ruler.task import Family, Prompt, Sample, Setting, Task
from nemo_star.evaluation.ruler.variable_tracking import VariableTracking

__all__ = ["Sample", "Task", "samples", "score", "split_sentences", "tasks"]

SEED = 42
"""RULER's."""


def _families() -> dict[str, Callable[[Task, Setting], Family]]:
    return {"niah": Niah, "vt": VariableTracking, "cwe": CommonWords, "fwe": FrequentWords, "qa": Questions}


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
        count: samples. The first ones of more samples are the same.
        count_tokens: tokens of a text, without a beginning-of-text token.
        data: folder with PaulGrahamEssays.json, squad.json, hotpotqa.json, for the tasks that take them.
        template_tokens: that a chat template adds to each prompt; they count within the target.
        split: sentences of an essay; NLTK's `sent_tokenize` makes the official prompts.

    Raises:
        ValueError: a file or package that the task takes is missing, says where it is; the target is too short.
    """
    if count < 0 or tokens < 1:
        raise ValueError(f"{count} samples of {tokens} tokens: both must be positive")
    family = _families()[task.family](task, Setting(tokens, seed, count_tokens, data, split, template_tokens))
    return (_sample(family, index, prompt) for index, prompt in enumerate(family.prompts(count)))


def _sample(family: Family, index: int, prompt: Prompt) -> Sample:
    name = family.task.name
    return Sample(
        id=f"{name}-{index}",
        task=name,
        context=prompt.context,
        query=prompt.query,
        outputs=prompt.outputs,
        tokens=family.count(prompt.text),
    )


def score(task: Task, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Per cent, two decimals, of a task's answers.

    Args:
        references: `Sample.outputs` of each.

    Raises:
        ValueError: not as many predictions as samples, or none.
    """
    metric = metrics.string_match_all if task.metric == "all" else metrics.string_match_part
    return metric(predictions, references)
