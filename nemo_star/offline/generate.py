"""`tools/generate.py`: requests -> answers. Rank 0 reads requests and writes answers; all ranks run the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist

from nemo_star.config.generate import GenerateConfig
from nemo_star.contexts.in_use import ContextsInUse
from nemo_star.engine.scheduler import Question, Scheduler
from nemo_star.llm.front import LLM
from nemo_star.models.dump import LayerDump
from nemo_star.offline.console import Console
from nemo_star.offline.feed import Feed, Group
from nemo_star.offline.requests import BadRequest, Request, RequestReader
from nemo_star.offline.sink import AnswerSink, answer_of
from nemo_star.offline.source import RequestSource
from nemo_star.parallel.groups import gather_objects, on_first_rank
from nemo_star.runtime.launch import EXIT_BAD_LINES
from nemo_star.runtime.memory import FreeMemory, free_memory, peak_memory_bytes
from nemo_star.runtime.store import connect

_REST_SECONDS = 0.005


def run(config: GenerateConfig, free_memory: Callable[[torch.device], FreeMemory] = free_memory) -> int:
    """Answer everything that `config` asks for; returns the exit code.

    Args:
        free_memory: what a rank's device has left; a context that certainly does not fit is refused.

    Raises:
        ValueError, OSError: a user's error, on all ranks alike.
    """
    with LLM.opened(config, free_memory) as llm:
        return Generation(config, llm).run()


class Generation:
    """One run of the tool. All ranks make one; source, sink and console do their work on rank 0."""

    def __init__(self, config: GenerateConfig, llm: LLM) -> None:
        self.config = config
        self.llm = llm
        self.console = Console(single=config.input is None)
        self.sink = AnswerSink(config)
        reader = RequestReader(
            llm.description.model.vocab_size, llm.tokenizer, config.chat_template, config.chat_template_kwargs
        )
        self.source = RequestSource(config, reader, self._check)
        name = on_first_rank(lambda: f"requests/{uuid4().hex}")
        replicas = llm.groups.dp.size()
        self._feed = Feed(connect(name) if replicas > 1 else dist.HashStore(), replicas)
        self._asked: dict[int, Request] = {}  # by the question's identity
        self._failure: Exception | None = None
        self._dump: LayerDump | None = None

    def run(self) -> int:
        """From what is cheap to check to what is expensive; returns the exit code."""
        llm = self.llm
        llm.check_sampling(self.config.inference.sampling(0))
        with llm.watchdog.suspended("reading requests"):
            on_first_rank(self._open)
        llm.load_weights()
        on_first_rank(self._start)
        inference = self.config.inference
        store = llm.context_store()
        self._contexts = ContextsInUse(llm.engine, store)
        self._scheduler: Scheduler = llm.scheduler(
            max_batch_size=1 if self.config.debug.dump else inference.max_batch_size,
            max_own_tokens=llm.max_own_tokens(store),
            steps_per_block=inference.steps_per_block,
            open_context=lambda work: self._contexts.open_even_alone(work, self._scheduler.works_in_use),
        )
        self._answer_all()
        peaks = gather_objects(peak_memory_bytes(llm.device))
        return on_first_rank(lambda: self._finish(peaks))

    def _open(self) -> None:
        self.sink.check()
        if (dump := self.config.debug.dump) is not None and (Path(dump).exists() or not Path(dump).parent.is_dir()):
            raise ValueError(f"debug.dump={dump} must be a new folder in one that exists")
        self.source.open()

    def _check(self, request: Request) -> None:
        new_tokens = len(request.query_ids) + self.config.inference.tokens_to_generate
        for warning in self.llm.check(len(request.context_ids), new_tokens):
            self.console.say(warning, warning=True)

    def _start(self) -> None:
        self.sink.open(self.source.resumed)
        if self.config.debug.dump is not None:
            Path(self.config.debug.dump).mkdir()
        if self.config.input is not None:
            self.console.count_requests(self.source.total, len(self.source.resumed.answers))

    def _answer_all(self) -> None:
        """Take groups of requests while there is room for them, and step on."""
        # One question is the first replica's, whose first rank has the console.
        scheduler, more = self._scheduler, self.config.input is not None or self.llm.groups.dp.rank() == 0
        while more or not scheduler.is_idle:
            if more and scheduler.has_room:
                more = self._take_in(wait=scheduler.is_idle)
            answered = scheduler.step()
            self._look_after()
            if answered:
                for question in answered:
                    if question.work.error is not None:
                        raise ValueError(question.work.error)
                pairs = [(question, self._asked.pop(id(question))) for question in answered]
                on_first_rank(lambda pairs=pairs: self._give(pairs), self.llm.groups.replica)  # type: ignore[misc]
                for question in answered:
                    self._contexts.let_go(question.work)
            if answered and self._dump is not None:
                self._dump.close()  # of the first request
        with self.llm.watchdog.suspended("keeping contexts"):
            self._contexts.store.close()
        with self.llm.watchdog.suspended("waiting for other replicas"):
            on_first_rank(self._write_the_rest)

    def _take_in(self, *, wait: bool) -> bool:
        """Questions of the next group, on all ranks of the replica; whether there may be more."""
        with self.llm.watchdog.suspended("reading requests"):
            group, is_first = on_first_rank(lambda: (self._take(wait), self._feed.took_first), self.llm.groups.replica)
        if group and is_first and self.config.debug.dump is not None:
            llm, folder = self.llm, Path(self.config.debug.dump)
            self._dump = LayerDump(folder, llm.engine.stage, llm.engine.state, llm.groups)
        on_block = self.console.block_done if self.llm.is_first_of_replica else lambda: None
        for request in group or []:
            work = self._contexts.work(request.context_ids, key=request.context_key, on_block=on_block)
            params = replace(
                self.config.inference.sampling(request.index), logits=self.config.output_logits is not None
            )
            question = self.llm.question(work, request.query_ids, params, show=self.console.show)
            self._asked[id(question)] = request
            self._scheduler.add(question)
        return group is not None

    def _take(self, wait: bool) -> Group | None:
        """On the replica's first rank. A request leaves it without its id and further fields."""
        while True:
            if dist.get_rank() == 0:
                self._look_after()
                if self._failure is not None:
                    raise self._failure
                self._write_answers()
            group = self._feed.take(wait=wait and dist.get_rank() > 0)
            if group != [] or not wait:
                return group and [replace(request, id=None, extra={}) for request in group]
            time.sleep(_REST_SECONDS)

    def _look_after(self) -> None:
        """On rank 0: read ahead for all replicas. What goes wrong is raised where all ranks of the replica meet."""
        if dist.get_rank() or self._failure is not None:
            return
        try:
            self._feed.lay_out(self._read)
        except (ValueError, OSError) as error:
            self._failure = error
            self._feed.fail(str(error))

    def _read(self) -> Request | BadRequest | None:
        """The next item of the input. Says what will run."""
        item, llm = self.source.next(), self.llm
        if item is not None:
            self.sink.expect(item)
        if isinstance(item, Request):
            self.console.describe(
                llm.method, len(item.context_ids), cp_size=llm.groups.cp.size(), computes=llm.engine.describe()
            )
        return item

    def _give(self, answered: Sequence[tuple[Question, Request]]) -> None:
        """On the replica's first rank: hand answers to rank 0, which writes what it can."""
        for question, request in answered:
            (result,) = self.llm.results(question)
            work = question.work
            assert result is not None
            assert work.report is not None
            assert work.began is not None
            self._feed.give(request.index, answer_of(request, result, work.report, work.began))
        if dist.get_rank() == 0:
            self._write_answers()

    def _write_answers(self) -> None:
        try:
            for _ in range(self.sink.write(self._feed.answers(self.sink.unanswered))):
                self.console.request_done()
        except OSError as error:
            self._feed.fail(str(error))
            raise

    def _write_the_rest(self) -> None:
        """Until the other replicas have answered, too."""
        while self.sink.is_waiting:
            self._write_answers()
            time.sleep(_REST_SECONDS)

    def _finish(self, peaks: Sequence[int]) -> int:
        self.console.close(self.sink.last_stats, peaks)
        self.sink.close()
        if not self.sink.has_bad_lines:
            return 0
        where = self.config.output or "the output"
        self.console.say(
            f"bad lines: {where} has an `error` field for each; exit code {EXIT_BAD_LINES}, torchrun's is 1"
        )
        return EXIT_BAD_LINES
