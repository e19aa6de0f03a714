"""Where answers go: lines of a file, and logits. On rank 0."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from nemo_star.config.generate import GenerateConfig
from nemo_star.engine.engine import PrefillReport
from nemo_star.offline.files import OutputFile, Resumed
from nemo_star.offline.requests import BadRequest, Request
from nemo_star.runtime.files import check_target, write_whole
from nemo_star.text.completion import Result


@dataclass(frozen=True)
class Answer:
    """A finished request: its fields of a JSON line and, where wanted, the logits [new_tokens, vocab] float32."""

    line: dict[str, Any]
    logits: Tensor | None


def answer_of(request: Request, result: Result, prefill: PrefillReport, began: float) -> Answer:
    """A line with its times, in seconds since work on the request's context `began` (`time.perf_counter`), for whose
    sake ever it was encoded."""
    first, last = result.token_times[0], result.token_times[-1]
    stats = {
        "prefill_seconds": prefill.seconds,
        "time_to_first_token_seconds": first - began,
        "decode_tokens_per_second": (len(result.token_ids) - 1) / (last - first) if last > first else None,
        "kv_tokens_per_cp_rank": prefill.kv_tokens_per_cp_rank,
    }
    line = {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "context_tokens": len(request.context_ids),
        "query_tokens": len(request.query_ids),
        "stats": stats,
    }
    return Answer(line, result.logits)


class AnswerSink:
    """Writes each answer as a whole line when it comes, logits at the end."""

    def __init__(self, config: GenerateConfig) -> None:
        self.has_bad_lines = False
        self.last_stats: dict[str, Any] = {}
        self._config = config
        self._output: OutputFile | None = None
        self._logits: dict[str, Tensor] = {}
        self._expected: deque[Request | BadRequest] = deque()

    def check(self) -> None:
        """Refuse files that cannot be written, or that would be lost; nothing is touched yet."""
        config = self._config
        ways = "resume=true (continue it) or overwrite=true"
        check_target("output", config.output, replace=config.overwrite or config.resume, ways=ways, streams=True)
        check_target("output_logits", config.output_logits, replace=config.overwrite)
        names = ("input", "context_file", "query_file", "output", "output_logits")
        check_apart({name: path for name in names if (path := getattr(config, name)) not in (None, "-")})

    def open(self, resumed: Resumed) -> None:
        """From here on, outputs are touched; `resumed` is kept of an earlier run's."""
        config = self._config
        self.has_bad_lines = any("token_ids" not in answer for answer in resumed.answers)
        if config.output_logits:
            Path(config.output_logits).unlink(missing_ok=True)
        if config.output is not None or config.input is not None:
            path = Path(config.output) if config.output else None
            self._output = OutputFile(path, kept_bytes=resumed.kept_bytes)

    def expect(self, item: Request | BadRequest) -> None:
        """The next item of the input."""
        self._expected.append(item)

    @property
    def is_waiting(self) -> bool:
        """Whether lines are still to be written."""
        return bool(self._expected)

    @property
    def unanswered(self) -> list[int]:
        """Places in the input of the requests whose lines are still to be written, in order."""
        return [item.index for item in self._expected if isinstance(item, Request)]

    def write(self, answers: Iterable[Answer]) -> int:
        """Write lines in the order of the input, as far as these answers to the first unanswered requests go; how
        many."""
        remaining, before = deque(answers), len(self._expected)
        while self._expected and (remaining or isinstance(self._expected[0], BadRequest)):
            item = self._expected.popleft()
            line = {"id": item.id, **item.extra}
            if isinstance(item, BadRequest):
                self.has_bad_lines = True
                line["error"] = item.error
            else:
                answer = remaining.popleft()
                line |= answer.line
                self.last_stats = answer.line["stats"]
                if answer.logits is not None:
                    self._logits[f"{item.id}/logits"] = answer.logits
            if self._output:
                self._output.write(line)
        return before - len(self._expected)

    def close(self) -> None:
        """Write what is written at the end."""
        if self._config.output_logits is not None:
            write_whole(Path(self._config.output_logits), lambda file: save_file(self._logits, file))


def check_apart(paths: Mapping[str, str]) -> None:
    """Refuse that one file is named for two things: one of them would be lost."""
    seen: dict[str, str] = {}
    for key, path in paths.items():
        real = os.path.realpath(path)
        if real in seen:
            raise ValueError(f"{seen[real]} and {key} are the same file: {path}")
        seen[real] = key
