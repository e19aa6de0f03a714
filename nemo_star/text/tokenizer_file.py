"""A tokenizer.json without transformers, whose import takes half a second."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_WITHOUT_EFFECT = frozenset(
    "added_tokens_decoder backend bos_token chat_template clean_up_tokenization_spaces eos_token is_local"
    " model_input_names model_max_length pad_token padding_side tokenizer_class unk_token".split()
)
"""Keys of tokenizer_config.json that change nothing in how a tokenizer.json tokenizes and decodes, where
`_adds_nothing` holds. Any other key is left to transformers."""
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("content", "special", "lstrip", "rstrip", "single_word", "normalized")


class Encoded(dict[str, Any]):
    """Token ids of texts, and `encodings`: what the tokenizers package knows of each."""

    def __init__(self, encodings: list[Any]) -> None:
        super().__init__(input_ids=[encoding.ids for encoding in encodings])
        self.encodings = encodings


class TokenizerFile:
    """What tokenizing and decoding take of a Hugging Face tokenizer, in its words.

    Args:
        backend: of the tokenizers package.
        ids: of `bos_token` and the like, where there is such a token.
        load: makes the tokenizer itself, with transformers.
    """

    def __init__(self, backend: Any, ids: dict[str, int], load: Callable[[], Any]) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend_tokenizer = backend
        self.bos_token_id, self.eos_token_id = ids.get("bos_token"), ids.get("eos_token")
        self.all_special_ids = sorted(set(ids.values()))
        self.added_tokens_decoder: dict[int, Any] = backend.get_added_tokens_decoder()
        self._load = load

    @classmethod
    def of(cls, file: Path, config: dict[str, Any], load: Callable[[], Any]) -> TokenizerFile | None:
        """None where transformers would make more of the two files than a tokenizer.json says by itself.

        Args:
            config: the values of tokenizer_config.json, which names the general class of tokenizers.
        """
        beside = ("added_tokens.json", "special_tokens_map.json")
        if set(config) - _WITHOUT_EFFECT or any((file.parent / name).is_file() for name in beside):
            return None
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(file))
        named = {name: _content(config[name]) for name in _NAMED if config.get(name) is not None}
        if not _adds_nothing(backend.get_added_tokens_decoder(), config, named):
            return None
        ids = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
        return cls(backend, {name: ids[content] for name, content in named.items()}, load)

    @functools.cached_property
    def whole(self) -> Any:
        """The tokenizer itself."""
        return self._load()

    def __call__(self, texts: list[str], *, add_special_tokens: bool, **_: Any) -> Encoded:
        return Encoded(self.backend_tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.backend_tokenizer.id_to_token(token)


def _adds_nothing(added: dict[int, Any], config: dict[str, Any], named: dict[str, str]) -> bool:
    """Whether the tokens that a tokenizer_config.json names or lists are those of the tokenizer.json, and text is not
    cleaned up (what that does depends on transformers' release)."""
    if config.get("clean_up_tokenization_spaces") is not False:
        return False
    listed = {int(number): token for number, token in config.get("added_tokens_decoder", {}).items()}
    for number, token in listed.items():
        held = added.get(number)
        if held is None or any(getattr(held, flag) != token.get(flag, getattr(held, flag)) for flag in _FLAGS):
            return False
    special = {token.content for token in added.values() if token.special}
    return special >= set(named.values())


def _content(token: str | dict[str, Any]) -> str:
    """A token's text: it is named by the text itself, or by a mapping."""
    return token["content"] if isinstance(token, dict) else token
