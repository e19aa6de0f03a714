"""Text <-> token ids, through the tokenizer files of a checkpoint."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from nemo_star.runtime.importing import no_garbage_collection

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""A space in a vocabulary of SentencePiece."""
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")
_SLICE_CHARACTERS = 2**16
_CONTEXT_MARK, _QUERY_MARK = "[context of nemo_star]", "[query of nemo_star]"


class Tokenizer:
    """Tokenization as Star Attention needs it: BOS before the context only, the query without special tokens."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self.hf = hf_tokenizer

    @classmethod
    def load(cls, directory: Path) -> Tokenizer | None:
        """The tokenizer in `directory`, or None where there is none.

        Raises:
            ValueError: tokenizer files that cannot be read.
        """
        if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
            return None
        sentencepiece_alone = (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file()
        try:
            if sentencepiece_alone:
                return cls(SentencePieceAlone(directory / "tokenizer.model"))
            return cls(_hf_tokenizer(directory))
        except Exception as error:  # the libraries behind it raise many kinds
            raise ValueError(f"tokenizer files in {directory} cannot be read: {error}") from error

    def encode_context(self, text: str, *, chat_template: bool = False) -> list[int]:
        """Token ids of a context, BOS first.

        With `chat_template` context and query make up one user message; everything before the query's text counts as
        context.

        Raises:
            ValueError: no chat template to apply.
        """
        if chat_template:
            return self._ids(self._in_template(text, "")[0])
        bos = [] if self.hf.bos_token_id is None else [self.hf.bos_token_id]
        return bos + self._ids(text)

    def encode_query(self, text: str, *, chat_template: bool = False) -> list[int]:
        """Token ids of a query, without special tokens but those of the chat template."""
        return self._ids(self._in_template("", text)[1] if chat_template else text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.hf.decode(list(ids), skip_special_tokens=True)

    def _ids(self, text: str) -> list[int]:
        """Tokens of a text; of a long one slice by slice, where that gives the same and time grows with the length."""
        cut = len(text) > _SLICE_CHARACTERS and self._words_stand_alone
        slices = cut_at_spaces(text, _SLICE_CHARACTERS) if cut else [text]
        return list(chain.from_iterable(self._each(slices)))

    def _each(self, texts: list[str]) -> list[list[int]]:
        return self.hf(texts, add_special_tokens=False, verbose=False)["input_ids"]

    @functools.cached_property
    def _words_stand_alone(self) -> bool:
        """A text may be cut at a space between two words, the space left out.

        So in the byte pair encodings of SentencePiece (Llama 2, Mistral): no token goes on past a space, and every text
        begins with one. They take a whole text as one word, in more than linear time; others cut it up by themselves.
        """
        if not _merges_pairs(self.hf):
            return False
        vocabulary = self.hf.get_vocab()
        if _SPACE not in vocabulary or any(re.search(f"[^{_SPACE}]{_SPACE}| ", token) for token in vocabulary):
            return False
        added = [token.content for token in getattr(self.hf, "added_tokens_decoder", {}).values()]
        if any(re.search(r"^\w|\w$", content) for content in added):  # a cut beside it would take its space
            return False
        whole, *words = self._each(["an end", "an", "end"])
        return whole == list(chain.from_iterable(words))

    def _in_template(self, context: str, query: str) -> tuple[str, str]:
        if not getattr(self.hf, "chat_template", None):
            raise ValueError("chat_template=true, but the checkpoint's tokenizer has no chat template")
        message = {"role": "user", "content": f"{_CONTEXT_MARK}\n\n{_QUERY_MARK}"}
        try:
            rendered: str = self.hf.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template's own code raises
            raise ValueError(f"the checkpoint's chat template cannot be applied: {error}") from error
        if rendered.count(_CONTEXT_MARK) != 1 or rendered.count(_QUERY_MARK) != 1:
            raise ValueError("the checkpoint's chat template does not give a user's message once and unchanged")
        before, between_and_after = rendered.split(_CONTEXT_MARK)
        between, after = between_and_after.split(_QUERY_MARK)
        return before + context + between, query + after


def _hf_tokenizer(directory: Path) -> Any:
    """The tokenizer that transformers makes of the files in `directory`."""
    with no_garbage_collection():
        from transformers import AutoTokenizer, PretrainedConfig  # only now: importing it takes seconds

    named = _json(directory / "tokenizer_config.json")
    options = {}
    if named.get("tokenizer_class") and "auto_map" not in named:
        # The class is named, so the model's type is all that is asked of its configuration. Left to itself,
        # AutoTokenizer imports the configuration's class, and with it torch's compiler: another second.
        model = _json(directory / "config.json")
        options["config"] = PretrainedConfig(**{name: model[name] for name in ("model_type",) if name in model})
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, **options)


def _json(file: Path) -> dict[str, Any]:
    """The values of a JSON file; none where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def cut_at_spaces(text: str, characters: int) -> list[str]:
    """A text cut at spaces between word characters, every `characters` or somewhat more; those spaces are left out."""
    slices, start = [], 0
    while start + characters < len(text) and (space := _BETWEEN_WORDS.search(text, start + characters)):
        slices.append(text[start : space.start()])
        start = space.end()
    return [*slices, text[start:]]


class SentencePieceAlone:
    """A tokenizer.model without a tokenizer.json, in the words of a Hugging Face tokenizer.

    transformers would convert it, and tokenizes the start of a text differently from SentencePiece.
    """

    chat_template = None

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=str(file))
        self.bos_token_id, self.eos_token_id = (
            token if token >= 0 else None for token in (self._model.bos_id(), self._model.eos_id())
        )
        self.all_special_ids = [i for i in range(self._model.vocab_size()) if self._model.is_control(i)]

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": self._model.encode(texts)}

    def get_vocab(self) -> dict[str, int]:
        return {self._model.id_to_piece(i): i for i in range(self._model.vocab_size())}

    @property
    def merges_pairs(self) -> bool:
        """Byte pair encoding: its scores are ranks. A unigram model's are logarithms of probabilities."""
        return all(self._model.get_score(i).is_integer() for i in range(self._model.vocab_size()))

    def decode(self, ids: list[int], **_: Any) -> str:
        return self._model.decode([i for i in ids if i not in self.all_special_ids])


def _merges_pairs(tokenizer: Any) -> bool:
    """Whether the tokenizer is known to be a byte pair encoding."""
    if isinstance(tokenizer, SentencePieceAlone):
        return tokenizer.merges_pairs
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return type(model).__name__ == "BPE" and not model.dropout and not model.ignore_merges


def end_token_ids(directory: Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Token ids that end an answer: generation_config.json's, else config.json's, and the tokenizer's."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _json(directory / name).get("eos_token_id")
        if value is not None:
            found.update(value if isinstance(value, list) else [value])
            break
    if tokenizer is not None and tokenizer.hf.eos_token_id is not None:
        found.add(tokenizer.hf.eos_token_id)
    return frozenset(found)


class TextStream:
    """Turns tokens into text as they come.

    Text is held back while it may still change: bytes of an unfinished character, and an end that may become one of
    `end_strings`. An end string ends the answer and is not part of its text.
    """

    def __init__(self, tokenizer: Tokenizer, end_strings: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.end_strings = end_strings
        self.text = ""
        self.ended = False
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

    def _add(self, text: str) -> None:
        searched_from = max(0, len(self.text) - max(map(len, self.end_strings), default=0))
        self.text += text
        found = [at for end in self.end_strings if (at := self.text.find(end, searched_from)) >= 0]
        if found:
            self.text, self.ended = self.text[: min(found)], True

    def _possible_end(self) -> int:
        """Length of the longest end of the text that is the start of an end string."""
        return max(
            (n for end in self.end_strings for n in range(1, len(end)) if self.text.endswith(end[:n])), default=0
        )

    def _show(self, until: int) -> str:
        text = self.text[self._shown : until]
        self._shown = max(self._shown, until)
        return text
