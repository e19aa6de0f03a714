"""A prompt of lm-evaluation-harness, which is one text -> context and query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nemo_star.text.messages import start_of_question
from nemo_star.text.sentencepiece_alone import SentencePieceAlone
from nemo_star.text.tokenizer import Tokenizer


def start_of_last_line(text: str) -> int | None:
    """Character at which the last line begins that is not blank; None where nothing but blanks stands before it."""
    start = text.rfind("\n", 0, len(text.rstrip())) + 1
    return start + len(text[start:]) - len(text[start:].lstrip()) if text[:start].strip() else None


QUERIES: dict[str, Callable[[str], int | None]] = {
    "last_line": start_of_last_line,
    "last_paragraph": start_of_question,
}


@dataclass(frozen=True)
class Cut:
    """Token ids of a prompt."""

    context: list[int]
    """Encoded once for all that ask of it; may be empty."""
    query: list[int]
    """At least one token: what comes next is predicted from its last one."""

    @property
    def tokens(self) -> int:
        """Of both."""
        return len(self.context) + len(self.query)

    def shortened(self, most: int) -> Cut:
        """Its last `most` tokens."""
        drop = max(0, self.tokens - most)
        return Cut(self.context[drop:], self.query[max(0, drop - len(self.context)) :])


class Prompts:
    """Tokenizes as the harness's `hf` model does: special tokens as the tokenizer puts them by itself.

    Args:
        query: which part of a prompt is the query, of `QUERIES`.
        add_bos: whether a text begins with the beginning-of-text token; None: as the tokenizer does.
    """

    def __init__(self, tokenizer: Tokenizer, *, query: str, add_bos: bool | None) -> None:
        if query not in QUERIES:
            raise ValueError(f"query={query!r} must be {' or '.join(QUERIES)}")
        self._tokenizer = tokenizer
        self._start_of_query = QUERIES[query]
        bos = tokenizer.bos_token_id
        self._bos = [] if bos is None else [int(bos)]
        self._bos_text = "" if bos is None else tokenizer.special_tokens.get(bos, "")
        self._adds_bos = self._puts_bos() if add_bos is None else add_bos

    def encode(self, text: str, *, special: bool | None = None) -> list[int]:
        """Token ids of a whole text.

        Args:
            special: whether a beginning-of-text token comes first; None: unless the text has one written out.
        """
        return [*self._before(text, special), *self._tokenizer.encode_query(text)]

    def cut(self, text: str) -> Cut:
        """The same ids, in two parts.

        Raises:
            ValueError: no token.
        """
        start = self._start_of_query(text)
        before = self._before(text, None)
        if start is None:
            return self._some([], [*before, *self._tokenizer.encode_query(text)])
        context, query = self._tokenizer.encode_cut(text, start)
        return self._some([*before, *context], query)

    @staticmethod
    def _some(context: list[int], query: list[int]) -> Cut:
        if not query:  # characters that the tokenizer drops
            context, query = context[:-1], context[-1:]
        if not query:
            raise ValueError("a prompt holds no token: there is nothing to predict from")
        return Cut(context, query)

    def _before(self, text: str, special: bool | None) -> list[int]:
        written_out = bool(self._bos_text) and text.startswith(self._bos_text)
        wanted = self._adds_bos and not written_out if special is None else special
        return self._bos if wanted else []

    def _puts_bos(self) -> bool:
        if isinstance(self._tokenizer.hf, SentencePieceAlone):  # puts none; the tokenizer that it stands for does
            return bool(self._bos)
        ids = self._tokenizer.hf(["a"], add_special_tokens=True)["input_ids"][0]
        return bool(self._bos) and ids[:1] == self._bos
