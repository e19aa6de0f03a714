"""`tools/evaluate.py`: attention methods on the same samples; what each costs in accuracy, and saves in time.

Each method is loaded once; its samples are dealt over the data parallel replicas, answered a round at a time, and
written down by rank 0.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from array import array
from pathlib import Path
from typing import Any

from nemo_star.config.evaluate import Contender, EvaluateConfig
from nemo_star.config.sampling import SamplingParams
from nemo_star.contexts.in_use import ContextsInUse, context_key
from nemo_star.engine.scheduler import Question, Scheduler
from nemo_star.evaluation.chat import in_template, template_tokens
from nemo_star.evaluation.progress import Progress, about
from nemo_star.evaluation.report import write_report
from nemo_star.evaluation.samples import Asked, given, made
from nemo_star.llm.opened import OpenedModel
from nemo_star.methods.registry import method_class
from nemo_star.parallel.groups import gather_objects, on_first_rank

_BATCHES = 2
"""Batches of a replica that are answered between two times that results are gathered."""


def run(config: EvaluateConfig) -> int:
    """Answer and score all samples with every contender; writes samples as they come, then the report.

    Raises:
        ValueError, OSError: a user's error, on all ranks alike.
    """
    return _Sweep(config).run()


class _Sweep:
    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._contenders = config.contenders()
        self._is_made = False
        self._samples: list[Asked] = []
        self._progress: Progress | None = None

    def run(self) -> int:
        by_kind = itertools.groupby(self._contenders, key=lambda contender: contender.candidate.word)
        for contenders in [list(group) for _, group in by_kind]:
            self._run_kind(contenders)
            gc.collect()  # its weights, before the next one's
        on_first_rank(self._report)
        return 0

    def _run_kind(self, contenders: list[Contender]) -> None:
        """Contenders that differ in sizes only: the weights are loaded once."""
        config = self._config
        length = max(config.lengths)
        parallel = config.parallel
        if not method_class(contenders[0].candidate.kind).shares_context:
            parallel = dataclasses.replace(parallel, context_parallel_size=None)
        settings = contenders[0].settings(config.attention, length)
        changed = dataclasses.replace(config, attention=settings, parallel=parallel)
        with OpenedModel.opened(changed) as llm:
            llm.max_batch_size = config.inference.max_batch_size
            if not self._is_made:
                with llm.watchdog.suspended("making samples"):
                    on_first_rank(lambda: self._make(llm))
                self._is_made = True
            left = on_first_rank(lambda: [contender for contender in contenders if self._left(contender)])
            if left:
                llm.load_weights()
            for contender in left:
                self._answer(llm, contender)

    def _make(self, llm: OpenedModel) -> None:
        """On rank 0: all samples, and which of them are answered."""
        config, tokenizer = self._config, llm.tokenizer
        if tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer: tasks are texts")
        self._progress = Progress(config)

        def count(text: str) -> int:
            return len(tokenizer.encode_query(text))

        around = template_tokens(tokenizer, config.chat_template_kwargs) if config.chat else 0
        self._samples = list(given(config, count) if config.input else made(config, count, template_tokens=around))
        self._progress.begin(llm, self._samples, contenders=len(self._contenders))

    def _left(self, contender: Contender) -> list[Asked]:
        """On rank 0: samples that this contender has not answered, those of one length next to each other."""
        assert self._progress is not None
        left = [asked for asked in self._samples if not self._progress.has(contender.name, asked)]
        return sorted(left, key=lambda asked: asked.length)

    def _answer(self, llm: OpenedModel, contender: Contender) -> None:
        """All of a contender's samples, a round of all replicas at a time."""
        replicas = llm.groups.dp.size()
        size = replicas * llm.max_batch_size * _BATCHES
        while batch := on_first_rank(lambda: self._next(contender, size)):
            llm.attend_by(contender.settings(self._config.attention, batch[0].length))
            found = gather_objects(self._answered(llm, batch[llm.groups.dp.rank() :: replicas]))
            on_first_rank(lambda found=found: self._write(contender, found))  # type: ignore[misc]

    def _next(self, contender: Contender, size: int) -> list[Asked]:
        """On rank 0: what is answered next, all of one length."""
        left = self._left(contender)
        if left:
            assert self._progress is not None
            self._progress.describe(f"{contender.name}, {left[0].length} tokens")
        return [asked for asked in left[:size] if asked.length == left[0].length]

    def _answered(self, llm: OpenedModel, samples: list[Asked]) -> list[tuple[Asked, dict[str, Any]]]:
        """What this replica answers; on its first rank, with the lines."""
        store = llm.context_store()
        contexts = ContextsInUse(llm.engine, store)
        scheduler: Scheduler = llm.scheduler(
            steps_per_block=self._config.inference.steps_per_block,
            max_own_tokens=llm.max_own_tokens(store),
            open_context=lambda work: contexts.open_even_alone(work, scheduler.works_in_use),
        )
        asked: dict[int, Asked] = {}
        owners = []
        for sample in samples:
            context, query = self._ids(llm, sample)
            params = SamplingParams(max_tokens=sample.max_tokens, stop=self._config.inference.end_strings)
            ids = array("i", context)
            # Each text is its own owner: none starts from another's first blocks, so prefill is timed as a whole.
            key = context_key(ids)
            owners.append(key.hex())
            question = llm.question(contexts.work(ids, owner=owners[-1], key=key), query, params)
            asked[id(question)] = sample
            scheduler.add(question)
        lines = []
        while not scheduler.is_idle:
            for question in scheduler.step():
                sample = asked[id(question)]
                if (line := self._line(llm, question, sample)) is not None:
                    lines.append((sample, line))
                contexts.let_go(question.work)
        for owner in owners:
            store.forget_owner(owner)  # what refers to them is in a cycle, and Python would collect it much later
        return lines

    def _ids(self, llm: OpenedModel, sample: Asked) -> list[list[int]]:
        """Of context and query, tokenized by this rank's replica for itself."""
        if not self._config.chat:
            return llm.ids_on_replica([("context", sample.context), ("query", sample.query)])

        def in_chat() -> list[list[int]]:
            assert llm.tokenizer is not None
            return list(in_template(llm.tokenizer, sample, self._config.chat_template_kwargs))

        return on_first_rank(in_chat, llm.groups.replica)

    def _line(self, llm: OpenedModel, question: Question, sample: Asked) -> dict[str, Any] | None:
        if question.work.error is not None:
            raise ValueError(f"sample {sample.id} of {sample.task}: {question.work.error}")
        (result,) = llm.results(question)
        if result is None:
            return None
        assert question.work.report is not None
        prediction = result.text or ""
        return {
            "score": sample.score(prediction),
            "prediction": prediction,
            "outputs": sample.outputs,
            "context_tokens": len(question.work.ids),
            "query_tokens": len(question.query_ids),
            "prefill_seconds": question.work.report.seconds,
            "ranks": llm.groups.replica.size(),
        }

    def _write(self, contender: Contender, found: list[list[tuple[Asked, dict[str, Any]]]]) -> None:
        assert self._progress is not None
        for asked, line in itertools.chain.from_iterable(found):
            self._progress.add(contender.name, asked, line)

    def _report(self) -> None:
        assert self._progress is not None
        self._progress.close()
        names = [contender.name for contender in self._contenders]
        print(write_report(Path(str(self._config.output)), self._progress.lines, names, about=about(self._config)))
