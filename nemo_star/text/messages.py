"""Messages as users give them, checked, with the place in them where the context ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_star.text.ids import is_unicode

ROLES = ("system", "user", "assistant", "tool")
BREAKPOINT = "prompt_cache_breakpoint"


class QueryNotFoundError(ValueError):
    """Nothing says where the context ends and the query begins."""


@dataclass(frozen=True)
class Place:
    """Where the context ends: just before or after a character, no blank, of a message; or before a whole message."""

    message: int
    character: int | None
    """None: before the message."""
    after: bool = False


def read_messages(messages: Any, *, continue_final_message: bool) -> tuple[list[dict[str, Any]], Place]:
    """Messages whose contents are texts (None beside tool calls), and where the context ends.

    Args:
        messages: as in OpenAI's interface: {"role", "content"}, a content being a text or a list of parts
            {"type": "text", "text"}, which are joined as they are. After a part with "prompt_cache_breakpoint": true
            the context ends; of several, after the last one. Further fields are left to the chat template.
        continue_final_message: the last message is the beginning of the answer.

    Raises:
        ValueError: what is wrong with which message, and what would be right.
    """
    chat, marked = _read_all(messages, continue_final_message)
    asked = [number for number, message in enumerate(chat) if message["role"] == "user"]
    if not asked:
        raise ValueError("messages hold none of the user: the last one of the user is the query")
    if marked is not None:
        return chat, _marked_place(chat, *marked)
    if not chat[asked[-1]]["content"].strip():
        raise ValueError(f"messages[{asked[-1]}], the last one of the user, is empty: it is the query")
    return chat, _place_by_rule(chat, asked)


def read_contents(messages: Any, *, continue_final_message: bool = False) -> list[dict[str, Any]]:
    """The same messages where all of them are the query: it does not matter where a context would end."""
    return _read_all(messages, continue_final_message)[0]


def _read_all(messages: Any, continue_final_message: bool) -> tuple[list[dict[str, Any]], tuple[int, int] | None]:
    """Messages with texts, and (message, character) of the last breakpoint."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('messages must be a list of at least one {"role", "content"}')
    chat: list[dict[str, Any]] = []
    marked = None
    for number, message in enumerate(messages):
        text, ends = _read_message(f"messages[{number}]", message)
        marked = (number, ends) if ends is not None else marked
        chat.append({**message, "content": text if message.get("content") is not None else None})
    _check_last(chat[-1]["role"], continue_final_message)
    return chat, marked


def _read_message(name: str, message: Any) -> tuple[str, int | None]:
    """The text of a message, and the character before which the context ends, where a part says so."""
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be an object with role and content, not {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{name} has role {role!r}; known roles: {', '.join(ROLES)}")
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise ValueError(f"{name}: content must be a string or a list of text parts, not {type(content).__name__}")
    text, ends = "", None
    for part in parts:
        text += _part_text(name, part)
        if part.get(BREAKPOINT):
            ends = len(text)
    if not is_unicode(text):
        raise ValueError(f"{name} holds half of a surrogate pair: not valid Unicode text")
    return text, ends


def _part_text(name: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise ValueError(f'{name} has a part of type {kind!r}; the model reads text: {{"type": "text", "text": ...}}')
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{name}: the text of a part must be a string, not {type(part.get('text')).__name__}")
    if unknown := sorted(set(part) - {"type", "text", BREAKPOINT}):
        raise ValueError(f"{name}: a part has the unknown field {unknown[0]!r}; known: type, text, {BREAKPOINT}")
    if not isinstance(part.get(BREAKPOINT, False), bool):
        raise ValueError(f"{name}: {BREAKPOINT}={part[BREAKPOINT]!r} must be true or false")
    return part["text"]


def _check_last(role: str, continue_final_message: bool) -> None:
    if continue_final_message and role != "assistant":
        raise ValueError(f"continue_final_message goes on with a last message of role assistant; its role is {role!r}")
    if role == "assistant" and not continue_final_message:
        raise ValueError(
            "the last message has role 'assistant': end with the user's, or give continue_final_message=true to "
            "go on with it"
        )
    if role == "system":
        raise ValueError("the last message has role 'system': end with the user's, which is the query")


def _marked_place(chat: Sequence[Mapping[str, Any]], number: int, ends: int) -> Place:
    """Blanks at the breakpoint belong to the context, unless the message ends there."""
    text = chat[number]["content"]
    if text[ends:].strip():
        return Place(number, ends + _leading_blanks(text[ends:]))
    if text.strip():
        return Place(number, len(text.rstrip()) - 1, after=True)
    raise ValueError(f"messages[{number}] is empty: {BREAKPOINT} needs a text to stand in")


def _place_by_rule(chat: Sequence[Mapping[str, Any]], asked: Sequence[int]) -> Place:
    """Before the user's last message; where it is the only one, before its last paragraph, else its last line.

    Args:
        asked: numbers of the user's messages.
    """
    last = asked[-1]
    if len(asked) == 1:
        question = start_of_question(chat[last]["content"])
        if question is not None:
            return Place(last, question)
        if not any((message["content"] or "").strip() for message in chat[:last]):
            raise QueryNotFoundError(
                "one message of one line: where the context ends and the query begins is not to be seen. Put a blank "
                f"line before the question, mark the part before it with {BREAKPOINT}, or give context and query"
            )
    return Place(last, None)


def start_of_question(text: str) -> int | None:
    """Character at which the last paragraph of a text begins, or its last line where it is one paragraph.

    None where it is one line.
    """
    start, end = _leading_blanks(text), len(text.rstrip())
    line_break, line_end = None, end
    while (at := text.rfind("\n", start, line_end)) >= 0:
        if not text[at + 1 : line_end].strip():  # a blank line
            return line_end + _leading_blanks(text[line_end:])
        line_break = at if line_break is None else line_break
        line_end = at
    return None if line_break is None else line_break + 1 + _leading_blanks(text[line_break + 1 :])


def _leading_blanks(text: str) -> int:
    return len(text) - len(text.lstrip())
