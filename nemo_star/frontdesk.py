"""Rank 0's side of a run: inputs checked before anything heavy starts, answers shown, written and kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from nemo_star.answer import Answer, Result, summary
from nemo_star.checkpoint.description import HF_FOLDER
from nemo_star.config import SMALL_BLOCK_TOKENS, GenerateConfig
from nemo_star.launch import EXIT_BAD_LINES, warn
from nemo_star.model import ModelConfig
from nemo_star.partition import PARTITIONS
from nemo_star.requests import BadRequest, InputFile, OutputFile, Request, RequestReader, check_resumed
from nemo_star.targets import check_target, write_whole
from nemo_star.tokenizer import Tokenizer, end_token_ids


@dataclass(frozen=True)
class Batch:
    """Consecutive lines of the input: at most one request per replica, and the bad lines between them."""

    items: list[Request | BadRequest]

    @property
    def requests(self) -> list[Request]:
        return [item for item in self.items if isinstance(item, Request)]


class FrontDesk:
    """Reads and checks requests, shows and writes answers: on rank 0; every replica's first rank makes answers."""

    def __init__(self, config: GenerateConfig, model: ModelConfig) -> None:
        self.config = config
        self.model = model
        self.tokenizer: Tokenizer | None = None
        self.end_ids: frozenset[int] = frozenset()
        self._reader: RequestReader
        self._items: Iterator[Request | BadRequest] = iter(())
        self._output: OutputFile | None = None
        self._bar = tqdm(disable=True)
        self._logits: dict[str, Tensor] = {}
        self._last_line: dict[str, Any] = {}
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
        self._reader = RequestReader(self.model.vocab_size, self.tokenizer, config.chat_template)
        ways = "resume=true (continue it) or overwrite=true"
        check_target("output", config.output, replace=config.overwrite or config.resume, ways=ways)
        check_target("output_logits", config.output_logits, replace=config.overwrite)
        if config.input is None:
            request = self._reader.from_text(read_text(config, "context"), read_text(config, "query"))
            self._check_sizes(request)
            self._items = iter([request])
        else:
            self._open_input(config.input)

    def _open_input(self, path: str) -> None:
        lines = InputFile(path)
        output = self.config.output
        if output is not None and path != "-" and os.path.exists(output) and os.path.samefile(path, output):
            raise ValueError(f"input and output are the same file: {path}")
        if self.config.output_logits is not None:
            check_distinct(list(lines.ids()))
        done = 0
        if self.config.resume:
            self._output = OutputFile(Path(str(self.config.output)), resume=True)
            check_resumed(self._output.done, lines.ids())
            done = len(self._output.done)
            self._any_bad = any("error" in answer for answer in self._output.done)
        self._items = (self._parsed(line, index) for index, line in enumerate(lines) if index >= done)
        self._bar = tqdm(total=sum(1 for _ in lines), initial=done, desc="requests", file=sys.stderr)

    def _parsed(self, line: bytes, index: int) -> Request | BadRequest:
        """The request of a line if it fits the model, else what is wrong with it."""
        request = self._reader.parse_line(line, index)
        if isinstance(request, Request):
            try:
                self._check_sizes(request)
            except ValueError as error:
                return BadRequest(request.id, request.index, str(error), request.extra)
        return request

    # While requests run

    def start(self, *, kernel: str, dtype: torch.dtype, cp_size: int) -> None:
        """The weights are loaded: outputs may be touched."""
        config = self.config
        self._runs_as = f"kernel {kernel}, {str(dtype).removeprefix('torch.')}"
        self._cp_size = cp_size
        if config.overwrite and config.output_logits:
            Path(config.output_logits).unlink(missing_ok=True)
        if self._output is None and (config.output is not None or config.input is not None):
            self._output = OutputFile(Path(config.output) if config.output else None)

    def next_batch(self, replicas: int) -> Batch | None:
        """The next lines, with at most one request per replica; None after the last. Says what will run."""
        items: list[Request | BadRequest] = []
        wanted = replicas
        while wanted and (item := next(self._items, None)) is not None:
            items.append(item)
            wanted -= isinstance(item, Request)
        batch = Batch(items)
        for request in batch.requests:
            self._describe(len(request.context_ids))
        return batch if items else None

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

    def take(self, batch: Batch, results: Sequence[Result]) -> None:
        """Write the lines of a batch, in the order of the input."""
        remaining = iter(results)
        for item in batch.items:
            if isinstance(item, BadRequest):
                self._any_bad = True
                line = {"id": item.id, **item.extra, "error": item.error}
            else:
                result = next(remaining)
                line = self._last_line = result.line
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
            self._tell(summary(self._last_line["stats"]))
        peaks = " + ".join(f"{peak / 2**20:.0f}" for peak in peak_memory_bytes)
        self._tell(f"peak memory per rank: {peaks} MiB")
        if self.config.output_logits is not None:
            write_whole(Path(self.config.output_logits), lambda file: save_file(self._logits, file))
        return EXIT_BAD_LINES if self._any_bad else 0

    def _check_sizes(self, request: Request) -> None:
        """Raises ValueError for sizes that cannot run, warns of those that hardly make sense."""
        context_tokens = len(request.context_ids)
        block_size, _anchor = self.config.attention.sizes(context_tokens)
        if self.config.attention.kind == "star" and block_size < SMALL_BLOCK_TOKENS:
            self._tell(f"attention.block_size is {block_size} tokens (tokens, not K): is that meant?", warning=True)
        last = context_tokens + len(request.query_ids) + self.config.inference.tokens_to_generate
        if last > self.model.max_position_embeddings:
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


def check_distinct(ids: list[Any]) -> None:
    """Logits are stored under the request's id: each must be there, and only once."""
    seen: set[str] = set()
    for number, identity in enumerate(ids, start=1):
        if identity is None:
            continue  # a line without id is reported when it is its turn
        if str(identity) in seen:
            raise ValueError(
                f"output_logits stores logits by id, and id {identity!r} of line {number} is not the first"
            )
        seen.add(str(identity))
