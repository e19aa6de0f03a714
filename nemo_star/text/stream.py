"""Text as it streams out of tokens, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_star.text.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text as they come.

    Text is held back while it may still change: bytes of an unfinished character, and an end that may become one of
    `end_strings`. An end string ends the answer and is not part of its text. Special tokens are no text, either; an end
    string that names one ("<|eot_id|>", "Bye<|im_end|>") is looked for where they are written out.
    """

    def __init__(self, tokenizer: Tokenizer, end_strings: Sequence[str] = ()) -> None:
        special = {token: text for token, text in tokenizer.special_tokens.items() if text} if end_strings else {}
        self.tokenizer = tokenizer
        self.end_strings = end_strings
        self.text = ""
        self.ended = False
        self._naming = [end for end in end_strings if any(text in end for text in special.values())]
        self._special = special if self._naming else {}
        self._written_out = ""  # `text` and the special tokens between; kept where an end string names one
        self._hidden: list[tuple[int, int]] = []  # where they stand in it
        self._ids: list[int] = []
        self._settled = self._read = 0  # ids before _settled are done with; ids before _read are in self.text
        self._shown = 0

    def push(self, token: int) -> str:
        """Add one token; returns the text that can be shown now."""
        self._ids.append(token)
        known = self.tokenizer.decode(self._ids[self._settled : self._read])
        now = self.tokenizer.decode(self._ids[self._settled :])
        if len(now) > len(known) and not now.endswith("\N{REPLACEMENT CHARACTER}"):
            self._settled, self._read = self._read, len(self._ids)
            self._add(now[len(known) :])
        if token in self._special and not self.ended:
            self._add(self._special[token], hidden=True)
        return self._show(len(self.text) if self.ended else len(self.text) - self._possible_end())

    def finish(self) -> str:
        """The text that was held back, once no more tokens come; `text` is then that of all tokens decoded at once."""
        if not self.ended:
            known = self.tokenizer.decode(self._ids[self._settled : self._read])
            self._add(self.tokenizer.decode(self._ids[self._settled :])[len(known) :])
        held_back = self._show(len(self.text))
        if not self.ended:
            self.text = self.tokenizer.decode(self._ids)  # differs where bytes make no characters
        return held_back

    def _add(self, text: str, *, hidden: bool = False) -> None:
        longest = max(map(len, self.end_strings), default=0)
        shown_from = max(0, len(self.text) - longest)
        written_from = max(0, len(self._written_out) - longest)
        if not hidden:
            self.text += text
        if self._naming:
            self._written_out += text
        if hidden:
            self._hidden.append((len(self._written_out) - len(text), len(self._written_out)))
        found = [at for end in self.end_strings if (at := self.text.find(end, shown_from)) >= 0]
        found += [
            self._without_hidden(at) for end in self._naming if (at := self._written_out.find(end, written_from)) >= 0
        ]
        if found:
            self.text, self.ended = self.text[: min(found)], True

    def _without_hidden(self, end: int) -> int:
        """Characters of `text` before character `end` of `_written_out`."""
        return end - sum(min(stop, end) - start for start, stop in self._hidden if start < end)

    def _possible_end(self) -> int:
        """Length of the longest end of the text that may be the start of an end string."""
        plain = [n for end in self.end_strings for n in range(1, len(end)) if self.text.endswith(end[:n])]
        written = len(self._written_out)
        naming = [
            len(self.text) - self._without_hidden(written - n)
            for end in self._naming
            for n in range(1, len(end))
            if self._written_out.endswith(end[:n])
        ]
        return max(plain + naming, default=0)

    def _show(self, until: int) -> str:
        text = self.text[self._shown : until]
        self._shown = max(self._shown, until)
        return text
