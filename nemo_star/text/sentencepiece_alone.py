"""A tokenizer.model without a tokenizer.json: SentencePiece, with the added tokens and the chat template beside it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""ModelProto.normalizer_spec.add_dummy_prefix = false. Appended to a serialized model, protobuf merges it in."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is taken out of a text before SentencePiece sees it, with the flags of tokenizer_config.json."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def pattern(self) -> str:
        """A regular expression of one group: the token, and the blanks that it takes with it."""
        before, after = (r"(?<!\w)", r"(?!\w)") if self.single_word else ("", "")
        blanks = [r"\s*" if strips else "" for strips in (self.lstrip, self.rstrip)]
        return f"({blanks[0]}{before}{re.escape(self.content)}{after}{blanks[1]})"


class SentencePieceAlone:
    """A tokenizer.model in the words of a Hugging Face tokenizer.

    transformers would convert it, and tokenizes the start of a text differently from SentencePiece. What it reads
    beside the model is read here, too: added tokens, the names of special ones, `legacy` (the text after an added token
    begins as a new text does, with a space of its own; so it is, too, where the key is missing, as it was before there
    was one) and the chat template.
    """

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=str(file))
        config = read_json(file.parent / "tokenizer_config.json")
        named = {**read_json(file.parent / "special_tokens_map.json"), **config}
        pieces = {self._model.id_to_piece(i): i for i in range(self._model.vocab_size())}
        self.added_tokens_decoder = _added_tokens(file.parent, named, pieces)
        self.chat_template = _chat_template(file.parent, config)
        self._legacy = config.get("legacy") is not False
        self._added = {token.content: i for i, token in self.added_tokens_decoder.items()}
        self._vocabulary = {**pieces, **self._added}
        self.bos_token_id = self._id_of("bos_token", named, self._model.bos_id())
        self.eos_token_id = self._id_of("eos_token", named, self._model.eos_id())
        self._named = {name: _content(value) for name, value in named.items() if _names_token(name, value)}
        for name, token in (("bos_token", self.bos_token_id), ("eos_token", self.eos_token_id)):
            if token is not None:
                self._named.setdefault(name, self.convert_ids_to_tokens(token))
        control = {i for i in range(self._model.vocab_size()) if self._model.is_control(i)}
        self.all_special_ids = sorted(control | {i for i, t in self.added_tokens_decoder.items() if t.special})

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        parts = [list(self._parts(text)) for text in texts]
        kinds: dict[str, list[str]] = {}
        for kind, part in chain.from_iterable(parts):
            kinds.setdefault(kind, []).append(part)
        ids = {kind: iter(self._encode(kind, listed)) for kind, listed in kinds.items()}
        return {"input_ids": [[i for kind, _ in listed for i in next(ids[kind])] for listed in parts]}

    def _encode(self, kind: str, parts: list[str]) -> list[list[int]]:
        """Token ids of parts of one kind (`_parts`), in one call of SentencePiece, which divides them by threads."""
        if kind == "added":
            return [[self._added[part]] for part in parts]
        return (self._model if kind == "start" else self._inner).encode(parts)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._vocabulary)

    def convert_ids_to_tokens(self, token: int) -> str:
        added = self.added_tokens_decoder.get(token)
        return added.content if added else self._model.id_to_piece(token)

    @property
    def merges_pairs(self) -> bool:
        """Byte pair encoding: its scores are ranks. A unigram model's are logarithms of probabilities."""
        return all(self._model.get_score(i).is_integer() for i in range(self._model.vocab_size()))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, **_: Any) -> str:
        """Text of tokens; ids that are no tokens have none. A space is dropped at the very start only."""
        special = set(self.all_special_ids)
        known = [i for i in ids if i < self._model.vocab_size() or i in self.added_tokens_decoder]
        kept = [i for i in known if not (skip_special_tokens and i in special)]
        text = ""
        for written_out, run in groupby(kept, key=lambda i: i in special or i in self.added_tokens_decoder):
            if written_out:
                text += "".join(map(self.convert_ids_to_tokens, run))
            else:
                text += (self._inner if text else self._model).decode(list(run))
        return text

    def apply_chat_template(self, messages: list[dict[str, Any]], *, tokenize: bool, **options: Any) -> str:
        """The text that transformers makes of the chat template; `tokenize` is false."""
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        rendered, _ = render_jinja_template([messages], chat_template=self.chat_template, **{**self._named, **options})
        return rendered[0]

    def _id_of(self, name: str, named: dict[str, Any], of_model: int) -> int | None:
        """Id of the token that the files beside the model name, else of the model's own one; either may be none."""
        if name in named:
            content = named[name]
            return None if content is None else self._vocabulary.get(_content(content))
        return of_model if of_model >= 0 else None

    def _parts(self, text: str) -> Iterator[tuple[str, str]]:
        """(kind, part): the `start` of a text, `added` tokens, `inner` text after one."""
        end = 0
        for found in self._pattern.finditer(text) if self._pattern else ():
            yield from self._plain(text[end : found.start()], end)
            yield "added", self._contents[found.lastindex - 1]  # type: ignore[operator]  # it is one of the groups
            end = found.end()
        yield from self._plain(text[end:], end)

    def _plain(self, part: str, start: int) -> Iterator[tuple[str, str]]:
        if part:
            yield "start" if start == 0 or self._legacy else "inner", part

    @functools.cached_property
    def _contents(self) -> list[str]:
        """Added tokens, the longer ones first: the first one that matches is taken."""
        return sorted(self._added, key=len, reverse=True)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        by_content = {token.content: token for token in self.added_tokens_decoder.values()}
        return re.compile("|".join(by_content[content].pattern for content in self._contents)) if by_content else None

    @functools.cached_property
    def _inner(self) -> Any:
        """The same model for text that goes on: no space is put before it."""
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self._model.serialized_model_proto() + _NO_DUMMY_PREFIX)


def read_json(file: Path) -> dict[str, Any]:
    """The values of a JSON file; none where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _added_tokens(folder: Path, named: dict[str, Any], pieces: dict[str, int]) -> dict[int, AddedToken]:
    """Tokens that the files beside a tokenizer.model give an id, or name and the model has; `named`: their values."""
    found = {i: AddedToken(content) for content, i in read_json(folder / "added_tokens.json").items()}
    flags = ("content", "special", "lstrip", "rstrip", "single_word")
    for i, values in named.get("added_tokens_decoder", {}).items():
        found[int(i)] = AddedToken(**{name: values[name] for name in flags if name in values})
    ids = {**pieces, **{token.content: i for i, token in found.items()}}
    listed = [value for name, value in named.items() if _names_token(name, value)]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        several = named.get(name) or []
        listed += several.values() if isinstance(several, dict) else several
    for i, content in ((ids[content], content) for content in map(_content, listed) if content in ids):
        found[i] = replace(found.get(i, AddedToken(content)), special=True)
    return found


def _names_token(name: str, value: Any) -> bool:
    """Whether a value of tokenizer_config.json is a special token: `bos_token` is, `add_bos_token` is not."""
    return name.endswith("_token") and isinstance(value, str | dict)


def _content(named: Any) -> str:
    """A token's text: it is named by the text itself, or by a mapping."""
    return named["content"] if isinstance(named, dict) else named


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Where transformers looks for it: chat_template.jinja, then tokenizer_config.json; of several, the default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}.get("default")
    return template
