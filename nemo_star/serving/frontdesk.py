"""Rank 0's side of a run: inputs checked before anything heavy starts, answers shown, written and kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from nemo_star.checkpoint.description import HF_FOLDER
from nemo_star.config.generate import GenerateConfig
from nemo_star.config.model import ModelConfig
from nemo_star.methods.config import SMALL_BLOCK_TOKENS
from nemo_star.methods.partition import PARTITIONS
from nemo_star.runtime.files import check_target, write_whole
from nemo_star.runtime.launch import EXIT_BAD_LINES, warn
from nemo_star.serving.answer import Answer, Result, summary
from nemo_star.serving.requests import BadRequest, InputFile, OutputFile, Request, RequestReader, Resumed, read_resumed
from nemo_star.text.tokenizer import Tokenizer, end_token_ids


class FrontDesk:
    """Reads and checks requests, shows and writes answers: on rank 0; every replica's first rank makes answers.

    Args:
        check_memory: raises ValueError for a context of so many tokens that certainly does not fit; 0: the weights.
    """

    def __init__(
        self,
        config: GenerateConfig,
        model: ModelConfig,
        check_memory: Callable[[int], None] = lambda context_tokens: None,
    ) -> None:
        self.config = config
        self.model = model
        self._check_memory = check_memory
        self.tokenizer: Tokenizer | None = None
        self.end_ids: frozenset[int] = frozenset()
        self._reader: RequestReader
        self._items: Iterator[Request | BadRequest] = iter(())
        self._output: OutputFile | None = None
        self._bar = tqdm(disable=True)
        self._logits: dict[str, Tensor] = {}
        self._last_stats: dict[str, Any] = {}
        self._batch: list[Request | BadRequest] = []
        self._resumed = Resumed([], 0)
        self._total_lines = 0
        self._any_bad = False
        self._runs_as = ""
        self._cp_size = 1
        self._described: tuple[int, int] | None = None
        self._told: set[str] = set()

    # Before the weights are loaded

    def load_tokenizer(self) -> None:
        """What every rank needs that chooses tokens."""
        hf_files = Path(str(self.config.checkpoint)) / HF_FOLDER
        self.tokenizer = Tokenizer.load(hf_files)
        if not self.config.inference.ignore_eos:
            self.end_ids = end_token_ids(hf_files, self.tokenizer)
        if self.config.inference.end_strings and self.tokenizer is None:
            raise ValueError("inference.end_strings needs text, and the checkpoint has no tokenizer")

    def open(self) -> None:
        """Check everything that can be checked without the weights; nothing is written yet."""
        config = self.config
        self._check_memory(0)
        self._reader = RequestReader(self.model.vocab_size, self.tokenizer, config.chat_template)
        ways = "resume=true (continue it) or overwrite=true"
        check_target("output", config.output, replace=config.overwrite or config.resume, ways=ways, streams=True)
        check_target("output_logits", config.output_logits, replace=config.overwrite)
        names = ("input", "context_file", "query_file", "output", "output_logits")
        check_apart({name: path for name in names if (path := getattr(config, name)) not in (None, "-")})
        if config.input is None:
            request = self._reader.from_text(read_text(config, "context"), read_text(config, "query"))
            self._check_sizes(request)
            self._items = iter([request])
        else:
            self._open_input(config.input)

    def _open_input(self, path: str) -> None:
        lines = InputFile(path)
        if self.config.output_logits is not None:
            check_distinct(lines.ids())
        if self.config.resume:
            self._resumed = read_resumed(Path(str(self.config.output)), lines.ids())
            self._any_bad = any("token_ids" not in answer for answer in self._resumed.answers)
        done = len(self._resumed.answers)
        self._total_lines = sum(1 for _ in lines)
        self._items = (self._parsed(line, index) for index, line in enumerate(lines) if index >= done)

    def _parsed(self, line: bytes, index: int) -> Request | BadRequest:
        """The request of a line if it fits the model, else what is wrong with it."""
        request = self._reader.parse_line(line, index)
        if isinstance(request, Request):
            try:
                if self.config.output_logits is not None and request.id is None:
                    raise ValueError("output_logits stores logits by id, and this line has none")
                self._check_sizes(request)
            except ValueError as error:
                return BadRequest(request.id, request.index, str(error), request.extra)
        return request

    # While requests run

    def start(self, runs_as: str, *, cp_size: int) -> None:
        """The weights are loaded: outputs may be touched."""
        config = self.config
        self._runs_as = runs_as
        self._cp_size = cp_size
        if config.output_logits:
            Path(config.output_logits).unlink(missing_ok=True)
        if config.output is not None or config.input is not None:
            path = Path(config.output) if config.output else None
            self._output = OutputFile(path, kept_bytes=self._resumed.kept_bytes)
        if config.input is not None:
            done = len(self._resumed.answers)
            self._bar = tqdm(total=self._total_lines, initial=done, desc="requests", file=sys.stderr)

    def next_batch(self, replicas: int) -> list[Request] | None:
        """The next requests, at most one for each replica; None after the last. Says what will run.

        Bad lines between them are answered with them. A request leaves this rank without its id and further fields.
        """
        self._batch = []
        wanted = replicas
        while wanted and (item := next(self._items, None)) is not None:
            self._batch.append(item)
            wanted -= isinstance(item, Request)
        requests = [item for item in self._batch if isinstance(item, Request)]
        for request in requests:
            self._describe(len(request.context_ids))
        return [replace(request, id=None, extra={}) for request in requests] if self._batch else None

    def begin(self, request: Request) -> Answer:
        """An answer to fill, on the first rank of the replica that runs the request."""
        single = self.config.input is None
        return Answer(
            request,
            self.config.inference,
            self.tokenizer,
            end_ids=self.end_ids,
            show=self._show if single else lambda piece: None,
            keep_logits=self.config.output_logits is not None,
        )

    def block_done(self) -> None:
        """Progress of a single question: one of this rank's blocks is encoded."""
        if self.config.input is None:
            self._bar.update()

    def take(self, results: Sequence[Result]) -> None:
        """Write the lines of the batch, in the order of the input."""
        remaining = iter(results)
        for item in self._batch:
            line = {"id": item.id, **item.extra}
            if isinstance(item, BadRequest):
                self._any_bad = True
                line["error"] = item.error
            else:
                result = next(remaining)
                line |= result.line
                self._last_stats = result.line["stats"]
                if result.logits is not None:
                    self._logits[f"{item.id}/logits"] = result.logits
            if self._output:
                self._output.write(line)
            if self.config.input is not None:
                self._bar.update()

    def close(self, peak_memory_bytes: Sequence[int]) -> int:
        """Write what is written at the end; the exit code."""
        self._bar.close()
        if self.config.input is None:
            print(flush=True)
            self._tell(summary(self._last_stats))
        peaks = " + ".join(f"{peak / 2**20:.0f}" for peak in peak_memory_bytes)
        self._tell(f"peak memory per rank: {peaks} MiB")
        if self.config.output_logits is not None:
            write_whole(Path(self.config.output_logits), lambda file: save_file(self._logits, file))
        if not self._any_bad:
            return 0
        where = self.config.output or "the output"
        self._tell(f"bad lines: {where} has an `error` field for each; exit code {EXIT_BAD_LINES}, torchrun's is 1")
        return EXIT_BAD_LINES

    def _check_sizes(self, request: Request) -> None:
        """Raises ValueError for sizes that cannot run, warns of those that hardly make sense."""
        context_tokens = len(request.context_ids)
        attention = self.config.attention
        block_size, _anchor = attention.sizes(context_tokens)
        self._check_memory(context_tokens)
        if attention.kind == "star" and attention.block_size is not None and block_size < SMALL_BLOCK_TOKENS:
            self._tell(f"attention.block_size is {block_size} tokens (tokens, not K): is that meant?", warning=True)
        last = context_tokens + len(request.query_ids) + self.config.inference.tokens_to_generate
        if self.model.max_position_embeddings and last > self.model.max_position_embeddings:
            self._tell(
                f"context, query and answer take up to {last} positions, the model was trained for "
                f"{self.model.max_position_embeddings}: answers may be poor",
                warning=True,
            )

    def _describe(self, context_tokens: int) -> None:
        """Say what will run before it runs, once for each pair of sizes."""
        config = self.config.attention
        partition = PARTITIONS[config.kind](context_tokens, *config.sizes(context_tokens), self._cp_size)
        if (sizes := (partition.block_size, partition.anchor_size)) == self._described:
            return
        self._described = sizes
        cut = ""
        if config.kind == "star":
            anchor = f"anchor of {partition.anchor_size} tokens ({config.anchor})"
            cut = f", {partition.num_blocks} blocks of {partition.block_size} tokens, {anchor}"
        held = " + ".join(str(partition.tokens_of(rank)) for rank in range(self._cp_size))
        ranks = f"{self._cp_size} context-parallel rank{'s' * (self._cp_size > 1)} holding {held} tokens"
        self._tell(f"{config.kind} attention: {context_tokens} context tokens{cut}; {ranks}; {self._runs_as}")
        if self.config.input is None:
            blocks = len(partition.ranks[0])
            self._bar = tqdm(total=blocks, desc="prefill", unit="block", file=sys.stderr, leave=False)

    def _show(self, piece: str) -> None:
        """Text of a single question's answer, as it comes."""
        self._bar.close()
        print(piece, end="", flush=True)

    def _tell(self, message: str, *, warning: bool = False) -> None:
        """Say something on standard error, once."""
        if message not in self._told:
            self._told.add(message)
            with tqdm.external_write_mode(file=sys.stderr):
                warn(message) if warning else print(message, file=sys.stderr, flush=True)


def read_text(config: GenerateConfig, name: str) -> str:
    """The context or query of a command line; one newline at the very end of a file is not part of its text."""
    text, path = getattr(config, name), getattr(config, f"{name}_file")
    if text is not None:
        return text
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return content.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}_file={path} is not UTF-8 text: {error}") from error


def check_apart(paths: Mapping[str, str]) -> None:
    """Refuse that one file is named for two things: one of them would be lost."""
    seen: dict[str, str] = {}
    for key, path in paths.items():
        real = os.path.realpath(path)
        if real in seen:
            raise ValueError(f"{seen[real]} and {key} are the same file: {path}")
        seen[real] = key


def check_distinct(ids: Iterator[Any]) -> None:
    """Logits are stored under the request's id: refuse one that comes twice (a line without one is a bad line)."""
    seen: set[str] = set()
    for number, identity in enumerate(ids, start=1):
        if identity is None:
            continue
        if str(identity) in seen:
            raise ValueError(
                f"output_logits stores logits by id, and id {identity!r} of line {number} is not the first"
            )
        if not str(identity).isprintable():
            raise ValueError(f"output_logits stores logits by id, and that of line {number} is no name: {identity!r}")
        seen.add(str(identity))
