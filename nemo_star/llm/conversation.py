"""Turns about one book: each sees the ones before it."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
class Turn:
    """A question and its answer."""

    query: Text
    result: Result
    start: int
    """Tokens of the conversation before it."""


class Conversation:
    """Questions that see the earlier questions and answers; the book stays as it is. Made by `LLM.converse`.

    With `LLM(chat_template=True)` the turns are the chat template's messages, the book the beginning of the first.
    Every replica holds the same conversation.
    """

    def __init__(self, llm: LLM, book: Book) -> None:
        self.book = book
        self.turns: list[Turn] = []
        self._llm = llm
        self._sequence: Sequence = llm.engine.sequence(book.encoded)
        self._ids: list[int] = []
        """All tokens after the book; the last one of an answer has been chosen and not run yet."""

    def ask(
        self, query: Text, params: SamplingParams | None = None, *, show: Callable[[str], None] = lambda text: None
    ) -> Result:
        """The next question (text or token ids), and its answer.

        Args:
            show: called on rank 0 with text as it becomes final.

        Raises:
            ValueError: an empty or unknown text or token; more than one sample (`fork` instead); a book that was
                appended to since the conversation began.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"a conversation goes on with one answer, not n={params.n}: fork() it for others")
        start = len(self._ids)
        ids = self._llm.ids_after(self._ids, [(turn.query, turn.result.text) for turn in self.turns], query)
        # A template may write an earlier turn in other tokens than those that were generated.
        shared = next((i for i, pair in enumerate(zip(ids, self._ids, strict=False)) if pair[0] != pair[1]), start)
        run = min(shared, self._sequence.tokens, len(ids) - 1)
        self._llm.engine.truncate(self._sequence, run)
        result = self._llm.go_on(self.book, self._sequence, ids[run:], params, show=show)
        self._ids = [*ids, *result.token_ids]
        self.turns.append(Turn(query, result, start))
        return result

    def truncate(self, turns: int) -> None:
        """Go back to where only the first `turns` questions have been asked.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 <= turns <= len(self.turns):
            raise ValueError(f"truncate({turns}): the conversation has {len(self.turns)} turns")
        if turns < len(self.turns):
            self._ids = self._ids[: self.turns[turns].start]
            del self.turns[turns:]
            self._llm.engine.truncate(self._sequence, min(self._sequence.tokens, len(self._ids)))

    def fork(self) -> Conversation:
        """Another conversation that goes on from here."""
        forked = copy.copy(self)
        forked._sequence = self._sequence.fork()
        forked.turns = list(self.turns)
        return forked
