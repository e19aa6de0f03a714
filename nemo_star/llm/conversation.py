"""Turns about one book: each sees the ones before it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_star.config.sampling import SamplingParams
from nemo_star.engine.context import Sequence
from nemo_star.llm.book import Book
from nemo_star.text.completion import Result
from nemo_star.text.ids import Text

if TYPE_CHECKING:
    from nemo_star.llm.front import LLM


@dataclass(frozen=True)
class _Turn:
    """Where the conversation stood before a turn."""

    tokens: int
    """In the sequence."""
    pending: tuple[int, ...]
    """Chosen and not run yet: the last token of the answer before."""


class Conversation:
    """Questions that see the earlier questions and answers; the book stays as it is.

    Every replica holds the same conversation.
    """

    def __init__(self, llm: LLM, book: Book) -> None:
        self.book = book
        self._llm = llm
        self._sequence: Sequence = llm.engine.sequence(book.encoded)
        self._pending: tuple[int, ...] = ()
        self._turns: list[_Turn] = []

    @property
    def turns(self) -> int:
        """Questions asked so far."""
        return len(self._turns)

    def ask(self, query: Text, params: SamplingParams | None = None) -> Result:
        """The next question (text or token ids), and its answer.

        Raises:
            ValueError: an empty or unknown text or token; more than one sample (`fork` instead); a book that was
                appended to since the conversation began.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"a conversation goes on with one answer, not n={params.n}: fork() it for others")
        before = _Turn(self._sequence.tokens, self._pending)
        result, self._pending = self._llm.go_on(self.book, self._sequence, self._pending, query, params)
        self._turns.append(before)
        return result

    def truncate(self, turns: int) -> None:
        """Go back to where only the first `turns` questions have been asked.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 <= turns <= len(self._turns):
            raise ValueError(f"truncate({turns}): the conversation has {len(self._turns)} turns")
        if turns < len(self._turns):
            turn = self._turns[turns]
            self._llm.engine.truncate(self._sequence, turn.tokens)
            self._pending = turn.pending
            del self._turns[turns:]

    def fork(self) -> Conversation:
        """Another conversation that goes on from here."""
        forked = copy.copy(self)
        forked._sequence = self._sequence.fork()
        forked._turns = list(self._turns)
        return forked
