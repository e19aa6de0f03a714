"""`tools/chat.py`: a conversation about one long text. Rank 0 reads questions and shows answers; all ranks run the
model."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from nemo_star.config.generate import GenerateConfig
from nemo_star.llm.book import Book
from nemo_star.llm.conversation import Conversation
from nemo_star.llm.front import LLM
from nemo_star.offline.console import Console
from nemo_star.offline.source import read_text
from nemo_star.parallel.groups import on_first_rank
from nemo_star.text.completion import Result

HELP = "Ask a question, or: /back (take the last question back), /append FILE, /help, /quit"


def run(config: GenerateConfig) -> int:
    """Encode the context, then answer question by question until the input ends; returns the exit code.

    Raises:
        ValueError, OSError: a user's error before the first question, on all ranks alike.
    """
    with LLM.opened(config) as llm:
        text = on_first_rank(lambda: read_text(config, "context"))
        llm.load_weights()
        chat = _Chat(config, llm, text)
        while chat.turn():
            pass
    return 0


class _Chat:
    def __init__(self, config: GenerateConfig, llm: LLM, text: str) -> None:
        self._config = config
        self._llm = llm
        self._console = Console(single=True)
        started = time.perf_counter()
        ids = llm.token_ids("context", text)
        llm.check(len(ids))
        if self._speaks:
            self._console.describe(llm.method, len(ids), cp_size=llm.groups.cp.size(), computes=llm.engine.describe())
        self._book: Book = llm.encode(ids, on_block=self._console.block_done)
        self._conversation: Conversation = llm.converse(self._book)
        self._say(f"{self._book.tokens} tokens encoded in {time.perf_counter() - started:.1f} s. {HELP}")

    @property
    def _speaks(self) -> bool:
        return self._llm.is_first_of_replica and self._llm.groups.dp.rank() == 0

    def _say(self, message: str) -> None:
        if self._speaks:
            print(message, file=sys.stderr, flush=True)

    def turn(self) -> bool:
        """One line of the input; whether there may be more. What is wrong with it is said, and the next one comes."""
        with self._llm.watchdog.suspended("reading what is typed"):
            line = on_first_rank(_read_line)
        if line is None or line == "/quit":
            return False
        try:
            self._carry_out(line)
        except (ValueError, OSError) as error:
            self._say(f"error: {error}")
        return True

    def _carry_out(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/help":
            self._say(HELP)
        elif command == "/back":
            self._conversation.truncate(max(0, len(self._conversation.turns) - 1))
            self._say(f"{len(self._conversation.turns)} questions are left")
        elif command == "/append" and not argument.strip():
            raise ValueError("/append takes a file: /append FILE")
        elif command == "/append":
            self._book.append(on_first_rank(lambda: Path(argument.strip()).read_text(encoding="utf-8")))
            self._conversation = self._llm.converse(self._book)
            self._say(f"{self._book.tokens} tokens; the conversation begins anew")
        elif command.startswith("/"):
            raise ValueError(f"unknown command {command}. {HELP}")
        elif line:
            self._answer(line)

    def _answer(self, question: str) -> None:
        started = time.perf_counter()
        params = self._config.inference.sampling(len(self._conversation.turns))
        result: Result = self._conversation.ask(question, params, show=lambda text: print(text, end="", flush=True))
        if self._speaks:
            print(flush=True)
            first = result.token_times[0] - started
            self._say(f"first token after {first:.2f} s, {len(result.token_ids)} tokens, {result.finish_reason}")


def _read_line() -> str | None:
    """The next line, None at the end of the input."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None
