"""The samples of a sweep: of tasks, made here, or those of a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_star.config.evaluate import EvaluateConfig
from nemo_star.evaluation.metrics import METRICS
from nemo_star.evaluation.task import Task
from nemo_star.evaluation.tasks import samples, tasks
from nemo_star.text.ids import Text

TOKENS_OF_GIVEN = 128
"""Generated for a given sample whose task is not known."""
METRIC_OF_GIVEN = "all"


@dataclass(frozen=True)
class Asked:
    """A sample, and how its answer is taken."""

    id: str
    task: str
    length: int
    """Of the sweep; of a given sample the smallest one that is not below its own, or the largest."""
    context: Text
    query: Text
    outputs: list[str]
    max_tokens: int
    metric: str = METRIC_OF_GIVEN
    answer_prefix: str = ""
    """The answer's first words, with which the query ends."""
    answer: Text | None = None
    """That is given for a comparison of distributions (`nemo-star fidelity`)."""

    def score(self, prediction: str) -> float:
        """0 to 100, by the task's metric."""
        assert isinstance(self.query, str)  # ids are compared only
        return METRICS[self.metric](prediction, self.outputs, self.query)


def made(config: EvaluateConfig, count_tokens: Callable[[str], int], *, template_tokens: int = 0) -> Iterator[Asked]:
    """Samples of the tasks, length by length.

    Args:
        template_tokens: of a chat template, which count within the length.

    Raises:
        ValueError: a task that is not known, files of it that are not there, a length that is too short.
    """
    known = tasks(star_paper=config.variant == "star_paper")
    data = None if config.data is None else Path(config.data)
    for name in config.tasks:
        if name not in known:
            raise ValueError(f"tasks: {name!r} is unknown; known: {', '.join(known)}")
    for length in config.lengths:
        for name in config.tasks:
            task = known[name]
            for sample in samples(
                task,
                tokens=length,
                count=config.samples,
                seed=config.seed,
                count_tokens=count_tokens,
                data=data,
                template_tokens=template_tokens,
            ):
                yield Asked(
                    str(sample.id),
                    name,
                    length,
                    sample.context,
                    sample.query,
                    list(sample.outputs),
                    task.tokens_to_generate,
                    task.metric,
                    _prefix(sample.query, task),
                )


def _prefix(query: str, task: Task) -> str:
    """Found as RULER's scripts find it, by its first ten characters."""
    at = query.rfind(task.answer_prefix[:10])
    return query[at:] if at > 0 else ""


def given(config: EvaluateConfig, count_tokens: Callable[[str], int], *, needs_outputs: bool = True) -> Iterator[Asked]:
    """The samples of a file.

    Args:
        needs_outputs: they are to be scored; else a line may have an answer.

    Raises:
        ValueError: a line that is none, by its number.
    """
    known = tasks(star_paper=config.variant == "star_paper")
    seen: Counter[tuple[str, str]] = Counter()
    with Path(str(config.input)).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                asked = _given(line, known, needs_outputs=needs_outputs)
                seen[asked.task, asked.id] += 1
                if seen[asked.task, asked.id] > 1:
                    raise ValueError(f"id {asked.id!r} of task {asked.task!r} comes twice")
            except KeyError as error:
                raise ValueError(f"input={config.input}, line {number} has no field {error}") from None
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"input={config.input}, line {number}: {error}") from None
            assert isinstance(asked.context, str)
            tokens = count_tokens(asked.context)
            yield replace(
                asked, length=min((each for each in config.lengths if each >= tokens), default=max(config.lengths))
            )


def _given(line: str, known: Mapping[str, Task], *, needs_outputs: bool) -> Asked:
    """A line as a sample, its length not known yet."""
    fields = json.loads(line)
    identity, name = str(fields["id"]), str(fields.get("task", "given"))
    context, query = fields["context"], fields["query"]
    outputs = fields["outputs"] if needs_outputs else fields.get("outputs", [])
    answer = None if needs_outputs else fields.get("answer")
    if not (isinstance(context, str) and isinstance(query, str) and context and query):
        raise ValueError("context and query must be texts")
    texts = isinstance(outputs, list) and all(isinstance(text, str) for text in outputs)
    if not texts or (needs_outputs and not outputs):
        raise ValueError("outputs must be a list of texts")
    if answer is not None and not (isinstance(answer, str) and answer):
        raise ValueError("answer must be a text")
    if name not in known:
        return Asked(identity, name, 0, context, query, outputs, TOKENS_OF_GIVEN, answer=answer)
    task = known[name]
    prefix = _prefix(query, task)
    return Asked(identity, name, 0, context, query, outputs, task.tokens_to_generate, task.metric, prefix, answer)
