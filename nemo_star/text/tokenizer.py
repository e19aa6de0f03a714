"""Text <-> token ids, through the tokenizer files of a checkpoint."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from nemo_star.runtime.importing import no_garbage_collection
from nemo_star.text.sentencepiece_alone import SentencePieceAlone, read_json
from nemo_star.text.tokenizer_file import TokenizerFile

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""A space in a vocabulary of SentencePiece."""
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")
_SLICE_CHARACTERS = 2**16
_SPEAKERS = ("user", "assistant")
_CONTEXT_MARK, _QUERY_MARK = "[context of nemo_star]", "[query of nemo_star]"


class Tokenizer:
    """Tokenization as Star Attention needs it: BOS before the context only, the query without special tokens."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self._tokenizes = hf_tokenizer

    @property
    def hf(self) -> Any:
        """The tokenizer of transformers (or `SentencePieceAlone`), with all that it can do."""
        return self._tokenizes.whole if isinstance(self._tokenizes, TokenizerFile) else self._tokenizes

    @property
    def bos_token_id(self) -> int | None:
        return self._tokenizes.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizes.eos_token_id

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

    def encode_context(
        self, text: str, *, chat_template: bool = False, template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a context, BOS first.

        With `chat_template` context and query make up one user message; everything before the query's text counts as
        context.

        Args:
            template_kwargs: further variables of the chat template.

        Raises:
            ValueError: no chat template to apply.
        """
        if chat_template:
            return self._ids(self._in_template(text, "", template_kwargs)[0])
        bos = [] if self.bos_token_id is None else [self.bos_token_id]
        return bos + self._ids(text)

    def encode_query(
        self, text: str, *, chat_template: bool = False, template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a query, without special tokens but those of the chat template."""
        return self._ids(self._in_template("", text, template_kwargs)[1] if chat_template else text)

    def encode_turns(
        self, turns: Sequence[tuple[str, str]], *, template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation after its context, which the first message begins with, up to the next answer.

        Args:
            turns: (question, answer) each; the last question has no answer yet and "" in its place.
        """
        chat = [{"role": role, "content": text} for turn in turns for role, text in zip(_SPEAKERS, turn, strict=True)]
        chat[0]["content"] = f"{_CONTEXT_MARK}\n\n{chat[0]['content']}"
        rendered = self.render(chat[:-1], add_generation_prompt=True, **(template_kwargs or {}))
        _, mark, after = rendered.partition(f"{_CONTEXT_MARK}\n\n")
        if not mark:
            raise ValueError("the checkpoint's chat template does not give a user's message unchanged")
        return self._ids(after)

    def encode_cut(self, text: str, at: int) -> tuple[list[int], list[int]]:
        """Token ids of a whole text, without special tokens of its own, in two parts.

        The parts are cut where the last token ends that ends at or before character `at`; tokens of blanks that stand
        there may be of the first part, too. Where the tokenizer does not say which characters a token is of, the start
        of the text is tokenized once more, and the cut is where its tokens begin to differ from those of the whole.
        """
        slices = self._slices(text)
        encoded = self._tokenizes(slices, add_special_tokens=False, verbose=False)
        all_ids: list[list[int]] = encoded["input_ids"]
        number = start = 0
        while at - start > len(slices[number]):
            start += len(slices[number]) + 1  # and the space that was left out
            number += 1
        held = _tokens_before(encoded, number, slices[number], at - start)
        if held is None:
            before = self._each([slices[number][: at - start]])[0]
            differ = (i for i, (one, other) in enumerate(zip(before, all_ids[number], strict=False)) if one != other)
            held = next(differ, min(len(before), len(all_ids[number])))
        count = sum(map(len, all_ids[:number])) + held
        ids = list(chain.from_iterable(all_ids))
        return ids[:count], ids[count:]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return self._tokenizes.decode(list(ids), skip_special_tokens=True)

    @functools.cached_property
    def special_tokens(self) -> dict[int, str]:
        """Texts of the tokens that `decode` leaves out, by id."""
        added = getattr(self._tokenizes, "added_tokens_decoder", {})
        named = {i: self._tokenizes.convert_ids_to_tokens(i) for i in self._tokenizes.all_special_ids}
        return named | {i: token.content for i, token in added.items() if token.special}

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The text that the chat template makes of messages {"role", "content"}.

        Args:
            options: of transformers' `apply_chat_template`, and variables of the template.

        Raises:
            ValueError: no chat template, or what the template itself raises.
        """
        if not getattr(self.hf, "chat_template", None):
            raise ValueError("the checkpoint's tokenizer has no chat template: give context and query as plain text")
        try:
            return self.hf.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # whatever the template's own code raises
            raise ValueError(f"the checkpoint's chat template cannot be applied: {error}") from error

    def _ids(self, text: str) -> list[int]:
        return list(chain.from_iterable(self._each(self._slices(text))))

    def _slices(self, text: str) -> list[str]:
        """A text, or slices of a long one, where that gives the same tokens in a time that grows with the length."""
        cut = len(text) > _SLICE_CHARACTERS and self._words_stand_alone
        return cut_at_spaces(text, _SLICE_CHARACTERS) if cut else [text]

    def _each(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizes(texts, add_special_tokens=False, verbose=False)["input_ids"]

    @functools.cached_property
    def _words_stand_alone(self) -> bool:
        """A text may be cut at a space between two words, the space left out.

        So in the byte pair encodings of SentencePiece (Llama 2, Mistral): no token goes on past a space, and every text
        begins with one. They take a whole text as one word, in more than linear time; others cut it up by themselves.
        """
        if not _merges_pairs(self._tokenizes):
            return False
        vocabulary = self._tokenizes.get_vocab()
        if _SPACE not in vocabulary or any(re.search(f"[^{_SPACE}]{_SPACE}| ", token) for token in vocabulary):
            return False
        added = [token.content for token in getattr(self._tokenizes, "added_tokens_decoder", {}).values()]
        if any(re.search(r"^\w|\w$", content) for content in added):  # a cut beside it would take its space
            return False
        whole, *words = self._each(["an end", "an", "end"])
        return whole == list(chain.from_iterable(words))

    def _in_template(
        self, context: str, query: str, template_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[str, str]:
        message = {"role": "user", "content": f"{_CONTEXT_MARK}\n\n{_QUERY_MARK}"}
        rendered = self.render([message], add_generation_prompt=True, **(template_kwargs or {}))
        if rendered.count(_CONTEXT_MARK) != 1 or rendered.count(_QUERY_MARK) != 1:
            raise ValueError("the checkpoint's chat template does not give a user's message once and unchanged")
        before, between_and_after = rendered.split(_CONTEXT_MARK)
        between, after = between_and_after.split(_QUERY_MARK)
        return before + context + between, query + after


def _hf_tokenizer(directory: Path) -> Any:
    """The tokenizer that transformers makes of the files in `directory`, or a `TokenizerFile` that stands for it."""
    named, model = (read_json(directory / f"{name}.json") for name in ("tokenizer_config", "config"))
    if _is_general(directory, named, model):
        load = functools.partial(_general, directory)
        return TokenizerFile.of(directory / "tokenizer.json", named, load) or load()
    with no_garbage_collection():
        import transformers  # only now: importing it takes half a second

        options = {}
        if named.get("tokenizer_class") and "auto_map" not in named:
            # The class is named, so the model's type is all that is asked of its configuration. Left to itself,
            # AutoTokenizer imports the configuration's class, and with it torch's compiler: another second.
            known = {name: model[name] for name in ("model_type",) if name in model}
            options["config"] = transformers.PretrainedConfig(**known)
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, **options)


def _general(directory: Path) -> Any:
    with no_garbage_collection():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def _is_general(directory: Path, named: dict[str, Any], model: dict[str, Any]) -> bool:
    """Whether AutoTokenizer, whose import takes as long as all else of transformers, would take the general class.

    Where that class is named it does, but for a model type whose checkpoints it knows to name a wrong one, and where a
    tekken.json may lead it to Mistral's own tokenizer.
    """
    return (
        named.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
        and "auto_map" not in named
        and (directory / "tokenizer.json").is_file()
        and not (directory / "tekken.json").is_file()
        and model.get("model_type") != "qwen2"
    )


def cut_at_spaces(text: str, characters: int) -> list[str]:
    """A text cut at spaces between word characters, every `characters` or somewhat more; those spaces are left out."""
    slices, start = [], 0
    while start + characters < len(text) and (space := _BETWEEN_WORDS.search(text, start + characters)):
        slices.append(text[start : space.start()])
        start = space.end()
    return [*slices, text[start:]]


def _tokens_before(encoded: Any, number: int, text: str, at: int) -> int | None:
    """How many tokens of text `number` of a batch end at or before its character `at`; None where it is not known."""
    encodings = getattr(encoded, "encodings", None)
    if encodings is None:
        return None
    if at == len(text):
        return len(encodings[number].ids)
    # A character that the tokenizer drops, or a space that it does not count as its token's, is of no token.
    tokens = (encodings[number].char_to_token(character) for character in range(at, min(len(text), at + 32)))
    return next((token for token in tokens if token is not None), None)


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
        value = read_json(directory / name).get("eos_token_id")
        if value is not None:
            found.update(value if isinstance(value, list) else [value])
            break
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(found)
