"""`tools/generate.py`: requests -> answers. Rank 0 reads requests and writes answers; all ranks run the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_star.config.generate import GenerateConfig
from nemo_star.llm import LLM
from nemo_star.models.dump import LayerDump
from nemo_star.parallel.groups import gather_objects, on_first_rank
from nemo_star.runtime.launch import EXIT_BAD_LINES
from nemo_star.runtime.memory import FreeMemory, free_memory, peak_memory_bytes
from nemo_star.serving.console import Console
from nemo_star.serving.requests import BadRequest, Request, RequestReader
from nemo_star.serving.sink import Answer, AnswerSink, answer_of
from nemo_star.serving.source import RequestSource


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
        self._batch: list[Request | BadRequest] = []
        self._dump: LayerDump | None = None

    def run(self) -> int:
        """From what is cheap to check to what is expensive; returns the exit code."""
        llm = self.llm
        llm.check_sampling(self.config.inference.sampling(0))
        with llm.watchdog.suspended("reading requests"):
            on_first_rank(self._open)
        llm.load_weights()
        on_first_rank(self._start)
        if self.config.debug.dump is not None and llm.groups.dp.rank() == 0:
            self._dump = LayerDump(Path(self.config.debug.dump), llm.engine.stage, llm.engine.state, llm.groups)
        while (requests := self._next_requests()) is not None:
            answers = self._answer(requests)
            on_first_rank(lambda answers=answers: self._take(answers))  # type: ignore[misc]
            if self._dump is not None:
                self._dump.close()  # of the first request
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

    def _next_requests(self) -> list[Request] | None:
        """The next requests on all ranks, at most one for each replica; None after the last."""
        with self.llm.watchdog.suspended("reading requests"):
            return on_first_rank(self._read_batch)

    def _read_batch(self) -> list[Request] | None:
        """Says what will run. A request leaves this rank without its id and further fields."""
        llm = self.llm
        self._batch = self.source.next_batch(llm.groups.dp.size())
        requests = [item for item in self._batch if isinstance(item, Request)]
        for request in requests:
            self.console.describe(
                llm.method, len(request.context_ids), cp_size=llm.groups.cp.size(), computes=llm.engine.describe()
            )
        return [replace(request, id=None, extra={}) for request in requests] if self._batch else None

    def _answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Run up to one request per replica; every replica's answer, in order, on rank 0 (empty on the others)."""
        groups = self.llm.groups
        replica = groups.dp.rank()
        answer = self._answer_one(requests[replica]) if replica < len(requests) else None
        answers: list[Answer | None] = [answer]
        if groups.dp.size() > 1 and self.llm.is_first_of_replica:
            answers = [None] * groups.dp.size()
            dist.gather_object(answer, answers if replica == 0 else None, group=groups.dp, group_dst=0)
        return [answer for answer in answers if answer is not None]

    def _answer_one(self, request: Request) -> Answer | None:
        """On the first rank of the replica that runs it."""
        started = time.perf_counter()
        params = replace(self.config.inference.sampling(request.index), logits=self.config.output_logits is not None)
        first = self.llm.is_first_of_replica
        context = self.llm.engine.encode(
            request.context_ids, on_block=self.console.block_done if first else lambda: None
        )
        result = self.llm.answer(context, request.query_ids, params, show=self.console.show)
        prefill = self.llm.engine.prefill_report(context)
        return None if result is None else answer_of(request, result, prefill, started)

    def _take(self, answers: Sequence[Answer]) -> None:
        self.sink.write(self._batch, answers)
        for _ in self._batch:
            self.console.request_done()

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
