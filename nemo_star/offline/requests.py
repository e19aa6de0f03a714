"""Requests: JSON lines, or the one question of a command line, validated one by one."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

from nemo_star.config.llm import check_template_kwargs
from nemo_star.contexts.in_use import context_key
from nemo_star.text.chat import split_messages
from nemo_star.text.ids import check_ids, check_text
from nemo_star.text.tokenizer import Tokenizer

_ALIASES = {"index": "id", "input_context": "context", "input_query": "query"}
"""Field names of the published reference implementation."""
_PARTS = ("context", "context_ids", "query", "query_ids")
_OF_MESSAGES = ("messages", "chat_template_kwargs", "continue_final_message")
_OWN_FIELDS = ("id", *_PARTS, *_OF_MESSAGES)
MAX_KEPT_TEXTS = 8
"""Contexts whose tokens are kept, because the next lines may ask of the same text."""


@dataclass(frozen=True)
class Request:
    """One question on one context, ready to run."""

    id: Any
    index: int
    """Line index in the input, from 0; added to the seed."""
    context_ids: array[int]
    query_ids: list[int]
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the input line, passed through."""

    @cached_property
    def context_key(self) -> bytes:
        """The same for requests on the same context."""
        return context_key(self.context_ids)


@dataclass(frozen=True)
class BadRequest:
    """A line that cannot run, and why."""

    id: Any
    index: int
    error: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RequestReader:
    """Turns input lines into requests. `vocab_size` bounds token ids; text needs a tokenizer.

    A line may name its context (`context_id`); later lines may then give the name alone.
    """

    vocab_size: int
    tokenizer: Tokenizer | None
    chat_template: bool = False
    """Wrap a context and a query as one message. Messages are in the template anyway."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables of the template; those of a line come on top."""
    _named: dict[str, array[int]] = field(default_factory=dict)
    _texts: dict[bytes, list[int]] = field(default_factory=dict)

    def parse_line(self, line: bytes, index: int) -> Request | BadRequest:
        """One JSON line; what is wrong with it comes back as a BadRequest."""
        fields: Mapping[str, Any] = {}
        try:
            fields = json_fields(line)
            return self._request(fields, index)
        except ValueError as error:
            return BadRequest(fields.get("id"), index, str(error), _extra(fields))

    def from_text(self, context: str, query: str) -> Request:
        """The one request of a command line."""
        return self._request({"id": 0, "context": context, "query": query}, 0)

    def _request(self, fields: Mapping[str, Any], index: int) -> Request:
        ids = self._ids_of_messages(fields) if fields.get("messages") is not None else self._ids_of_parts(fields)
        for name, values in ids.items():
            if not isinstance(values, array):
                check_ids(name, values, self.vocab_size)
        context = array("i", ids["context"])
        if (identity := fields.get("context_id")) is not None:
            if not isinstance(identity, str):
                raise ValueError(f"context_id must be a string, not {type(identity).__name__}")
            if self._named.setdefault(identity, context) != context:
                raise ValueError(f"context_id {identity!r} was given with another context before")
        return Request(fields.get("id"), index, context, ids["query"], _extra(fields))

    def _ids_of_messages(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        beside = [name for name in _PARTS if fields.get(name) is not None]
        if beside:
            raise ValueError(f"messages goes without {', '.join(beside)}: give one of both")
        context, query = split_messages(
            self.tokenizer,
            fields["messages"],
            template_kwargs=self._template_kwargs(fields),
            continue_final_message=fields.get("continue_final_message") or False,
        )
        return {"context": context, "query": query}

    def _ids_of_parts(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        texts = {name: fields.get(name) for name in ("context", "query")}
        ids: dict[str, Any] = {name: fields.get(f"{name}_ids") for name in ("context", "query")}
        if texts["context"] is None and ids["context"] is None and fields.get("context_id") is not None:
            ids["context"] = self._context_named(fields["context_id"])
        for name in ("context", "query"):
            if (texts[name] is None) == (ids[name] is None):
                raise ValueError(f"give either {name} (text) or {name}_ids (token ids), or messages")
        if self.chat_template and None in texts.values() and any(text is not None for text in texts.values()):
            raise ValueError("chat_template=true needs both context and query as text")
        if fields.get("continue_final_message"):
            raise ValueError("continue_final_message needs messages")
        if fields.get("chat_template_kwargs") and not (self.chat_template and texts["query"] is not None):
            raise ValueError("chat_template_kwargs needs messages, or chat_template=true and texts")
        for name, text in texts.items():
            if text is not None:
                check_text(name, text, self.tokenizer)
                ids[name] = self._encode(name, text, self._template_kwargs(fields))
        return ids

    def _context_named(self, identity: Any) -> array[int]:
        if identity not in self._named:
            raise ValueError(f"context_id {identity!r} is not known: an earlier line must give it with its context")
        return self._named[identity]

    def _template_kwargs(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        of_line = fields.get("chat_template_kwargs")
        check_template_kwargs(of_line)
        return {**(self.chat_template_kwargs or {}), **(of_line or {})}

    def _encode(self, name: str, text: str, template_kwargs: Mapping[str, Any]) -> list[int]:
        assert self.tokenizer is not None
        if name == "query":
            return self.tokenizer.encode_query(text, chat_template=self.chat_template, template_kwargs=template_kwargs)
        key = sha256(repr((text, template_kwargs)).encode("utf-8", "surrogatepass")).digest()
        if key not in self._texts:
            if len(self._texts) == MAX_KEPT_TEXTS:
                del self._texts[next(iter(self._texts))]
            self._texts[key] = self.tokenizer.encode_context(
                text, chat_template=self.chat_template, template_kwargs=template_kwargs
            )
        return self._texts[key]


def json_fields(line: bytes) -> dict[str, Any]:
    """The fields of a JSON line, by their own names; raises ValueError for what is none."""
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    renamed: dict[str, Any] = {}
    for key, value in fields.items():
        name = _ALIASES[key] if key in _ALIASES and _ALIASES[key] not in fields else key
        renamed[name] = value
    return renamed


def _extra(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in _OWN_FIELDS}
