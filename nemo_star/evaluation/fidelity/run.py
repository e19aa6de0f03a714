"""`tools/fidelity.py`: samples dealt over the data parallel replicas, each with all contenders; rank 0 writes.

A context is not shared over ranks unless it is asked for: dense attention, the reference, is on one cp rank anyway, and
replicas then work side by side.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_star.config.fidelity import FidelityConfig
from nemo_star.config.sampling import SamplingParams
from nemo_star.evaluation.fidelity.measure import Line, Measurement, Tokens
from nemo_star.evaluation.fidelity.report import write_report
from nemo_star.evaluation.fidelity.scores import Scores, read_scores
from nemo_star.evaluation.fidelity.texts import pieces, place_of
from nemo_star.evaluation.progress import Progress, about
from nemo_star.evaluation.samples import Asked, given, made
from nemo_star.llm.opened import OpenedModel
from nemo_star.parallel.groups import gather_objects, on_first_rank

Found = list[tuple[Asked, dict[str, Line]]]


def run(config: FidelityConfig) -> int:
    """Measure all samples with every contender; writes them as they come, then the report.

    Raises:
        ValueError, OSError: a user's error, on all ranks alike.
    """
    return _Fidelity(config).run()


class _Fidelity:
    def __init__(self, config: FidelityConfig) -> None:
        self._config = config
        self._contenders = {contender.name: contender for contender in config.contenders()}
        self._samples: list[Asked] = []
        self._with_sinks: set[int] = set()
        self._progress: Progress | None = None
        self._scores: Scores = {}

    def run(self) -> int:
        config = self._config
        shared = config.parallel.context_parallel_size or 1
        one_block = dataclasses.replace(
            config.attention,
            kind=next(iter(self._contenders.values())).candidate.kind,
            block_size=max(config.lengths),
            anchor_size=0,
            overlap_size=0,
        )
        changed = dataclasses.replace(
            config,
            attention=one_block,
            parallel=dataclasses.replace(config.parallel, context_parallel_size=shared),
        )
        with OpenedModel.opened(changed) as llm:
            with llm.watchdog.suspended("making samples"):
                on_first_rank(lambda: self._make(llm))
            if on_first_rank(lambda: bool(self._left())):
                llm.load_weights()
                self._measure(llm)
        on_first_rank(self._report)
        return 0

    def _make(self, llm: OpenedModel) -> None:
        """On rank 0: all samples, and which of them are measured."""
        config, tokenizer = self._config, llm.tokenizer
        if tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer: samples are texts")
        self._progress = Progress(config, without_effect=("scores", "tolerance"))
        if config.scores is not None:
            self._scores = read_scores(Path(config.scores), self._progress.sweep)

        def count(text: str) -> int:
            return len(tokenizer.encode_query(text))

        if config.texts:
            self._samples = list(pieces(config, tokenizer))
        elif config.input:
            self._samples = list(given(config, count, needs_outputs=False))
        else:
            self._samples = list(made(config, count))
        self._progress.begin(llm, self._samples, contenders=len(self._contenders))

    def _left(self) -> list[tuple[Asked, list[str], bool]]:
        """On rank 0: samples, the contenders that they are not measured with, and whether first tokens are wanted."""
        assert self._progress is not None
        left, seen = [], dict[tuple[str, int], int]()
        for asked in self._samples:
            number = seen[asked.task, asked.length] = seen.get((asked.task, asked.length), 0) + 1
            names = [name for name in self._contenders if not self._progress.has(name, asked)]
            if names:
                left.append((asked, names, number <= self._config.sink_samples))
        return left

    def _measure(self, llm: OpenedModel) -> None:
        """A sample on each replica at a time."""
        replicas = llm.groups.dp.size()
        while batch := on_first_rank(lambda: self._left()[:replicas]):
            mine = batch[llm.groups.dp.rank() :: replicas]
            found = gather_objects([(asked, self._lines(llm, asked, names, sinks)) for asked, names, sinks in mine])
            # The first rank of each replica has all values.
            firsts = gather_objects(llm.is_first_of_replica)
            on_first_rank(lambda found=found, firsts=firsts: self._write(found, firsts))  # type: ignore[misc]

    def _lines(self, llm: OpenedModel, asked: Asked, names: list[str], sinks: bool) -> dict[str, Line]:
        config = self._config
        context, query = llm.ids_on_replica([("context", asked.context), ("query", asked.query)])
        answer, place = on_first_rank(lambda: self._answer_and_place(llm, asked), llm.groups.replica)
        contenders = {name: self._contenders[name].settings(config.attention, asked.length) for name in names}
        measurement = Measurement(llm, contenders, rows=config.rows, seed=config.seed)
        params = SamplingParams(max_tokens=asked.max_tokens, stop=config.inference.end_strings)
        return measurement.lines(Tokens(context, query, answer, place), params, sinks=sinks)

    def _answer_and_place(self, llm: OpenedModel, asked: Asked) -> tuple[list[int] | None, int | None]:
        tokenizer = llm.tokenizer
        assert tokenizer is not None
        answer = tokenizer.encode_query(asked.answer) if isinstance(asked.answer, str) else asked.answer
        place = place_of(asked, lambda text: len(tokenizer.encode_context(text)))
        return None if answer is None else list(answer), place

    def _write(self, found: list[Found], firsts: list[bool]) -> None:
        assert self._progress is not None
        for of_rank, is_first in zip(found, firsts, strict=True):
            for asked, lines in of_rank if is_first else []:
                for name, line in lines.items():
                    self._progress.add(name, asked, line)

    def _report(self) -> None:
        assert self._progress is not None
        self._progress.close()
        print(
            write_report(
                Path(str(self._config.output)),
                self._progress.lines,
                list(self._contenders),
                self._scores,
                about=about(self._config),
                tolerance=self._config.tolerance,
            )
        )
