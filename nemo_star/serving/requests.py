"""Requests: JSON lines, or the one question of a command line, validated one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_star.config.llm import check_template_kwargs
from nemo_star.text.chat import split_messages
from nemo_star.text.ids import check_ids, check_text
from nemo_star.text.tokenizer import Tokenizer

_ALIASES = {"index": "id", "input_context": "context", "input_query": "query"}
"""Field names of the published reference implementation."""
_PARTS = ("context", "context_ids", "query", "query_ids")
_OF_MESSAGES = ("messages", "chat_template_kwargs", "continue_final_message")
_OWN_FIELDS = ("id", *_PARTS, *_OF_MESSAGES)


@dataclass(frozen=True)
class Request:
    """One question on one context, ready to run."""

    id: Any
    index: int
    """Line index in the input, from 0; added to the seed."""
    context_ids: list[int]
    query_ids: list[int]
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the input line, passed through."""


@dataclass(frozen=True)
class BadRequest:
    """A line that cannot run, and why."""

    id: Any
    index: int
    error: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RequestReader:
    """Turns input lines into requests. `vocab_size` bounds token ids; text needs a tokenizer."""

    vocab_size: int
    tokenizer: Tokenizer | None
    chat_template: bool = False
    """Wrap a context and a query as one message. Messages are in the template anyway."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables of the template; those of a line come on top."""

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
            check_ids(name, values, self.vocab_size)
        return Request(fields.get("id"), index, ids["context"], ids["query"], _extra(fields))

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

    def _template_kwargs(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        of_line = fields.get("chat_template_kwargs")
        check_template_kwargs(of_line)
        return {**(self.chat_template_kwargs or {}), **(of_line or {})}

    def _encode(self, name: str, text: str, template_kwargs: Mapping[str, Any]) -> list[int]:
        assert self.tokenizer is not None
        encode = self.tokenizer.encode_context if name == "context" else self.tokenizer.encode_query
        return encode(text, chat_template=self.chat_template, template_kwargs=template_kwargs)


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
