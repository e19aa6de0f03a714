"""Messages -> context and query: the chat template's tokens, cut in two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_star.config.llm import check_template_kwargs
from nemo_star.text.messages import read_messages
from nemo_star.text.tokenizer import Tokenizer

_MARK = "[context of nemo_star ends]"
Chat = list[dict[str, Any]]


def split_messages(
    tokenizer: Tokenizer | None,
    messages: Any,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
    answer_prefix: str = "",
) -> tuple[list[int], list[int]]:
    """Token ids of context and query of a conversation.

    One after the other they are the ids that the chat template gives for all messages as one text, with the generation
    prompt. The context ends after the part that says so ("prompt_cache_breakpoint"), else before the user's last
    message; where that is the user's only one, before its last paragraph, else before its last line.

    Args:
        messages: {"role", "content"}, as `read_messages` takes them.
        template_kwargs: further variables of the template, such as enable_thinking.
        continue_final_message: the last message is the assistant's, and the answer goes on with it.
        answer_prefix: text right after the generation prompt, whatever the template would make of its blanks.

    Raises:
        ValueError: no tokenizer or template, messages or variables that they do not take, a query not to be found.
    """
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer: give token ids (context_ids, query_ids) instead of messages")
    check_template_kwargs(template_kwargs)
    if not isinstance(continue_final_message, bool):
        raise ValueError(f"continue_final_message={continue_final_message!r} must be true or false")
    chat, place = read_messages(messages, continue_final_message=continue_final_message)
    end = {"continue_final_message": True} if continue_final_message else {"add_generation_prompt": True}
    template = _Template(tokenizer, template_kwargs or {}, end)
    template.check_roles(chat)
    if place.character is None:
        text, at = template.before(chat, place.message)
    else:
        text, at = template.within(chat, place.message, place.character, after=place.after)
    return tokenizer.encode_cut(text + answer_prefix, at)


class _Template:
    """A chat template with its variables; `end` says how a whole conversation ends."""

    def __init__(self, tokenizer: Tokenizer, variables: Mapping[str, Any], end: Mapping[str, bool]) -> None:
        self._tokenizer = tokenizer
        self._variables = variables
        self._end = end

    def check_roles(self, chat: Chat) -> None:
        """Refuse messages that the template leaves out: not every one takes a system's or a tool's."""
        numbers = [i for i, message in enumerate(chat) if message["role"] in ("system", "tool") and message["content"]]
        if not numbers:
            return
        marks = {i: f"{_MARK}{i};" for i in numbers}
        text = self._whole([{**m, "content": m["content"] + marks[i]} if i in marks else m for i, m in enumerate(chat)])
        for number in numbers:
            if marks[number] not in text:
                raise ValueError(
                    f"the checkpoint's chat template leaves out messages[{number}], of role {chat[number]['role']!r}"
                )

    def within(self, chat: Chat, number: int, character: int, *, after: bool = False) -> tuple[str, int]:
        """The text of a conversation, and where in it a character of a message stands, or the one after it.

        Args:
            character: no blank.
        """
        text, mark = self._whole(chat), _MARK
        while mark in text:
            mark = f"[{mark}]"
        # The mark follows a character that is no blank, so a template that strips contents does so with it, too.
        content, end = chat[number]["content"], character + 1
        marked = list(chat)
        marked[number] = {**chat[number], "content": content[:end] + mark + content[end:]}
        for _ in range(2):  # a template that tells the date may do so at midnight
            with_mark = self._whole(marked)
            if with_mark.count(mark) == 1 and with_mark.replace(mark, "") == text:
                return text, with_mark.index(mark) - (0 if after else 1)
            text = self._whole(chat)
        raise ValueError(
            f"the checkpoint's chat template does not give the text of messages[{number}] once and unchanged"
        )

    def before(self, chat: Chat, number: int) -> tuple[str, int]:
        """The text of a conversation, and where in it a message begins, with its header where that can be told."""
        content = chat[number]["content"]
        text, at = self.within(chat, number, len(content) - len(content.lstrip()))
        try:
            earlier = self._tokenizer.render(chat[:number], **self._variables) if number else ""
        except ValueError:  # it takes no conversation without a question, for instance
            return text, at
        # They part where the header begins, unless the template writes an earlier turn differently once there is this
        # one, or moves the system's text into it.
        differ = (i for i, (one, other) in enumerate(zip(earlier, text, strict=False)) if one != other)
        shared = text[: next(differ, len(earlier))]
        complete = shared and (chat[number - 1]["content"] or "").strip() in shared
        return text, min(at, len(shared)) if complete else at

    def _whole(self, chat: Chat) -> str:
        return self._tokenizer.render(chat, **self._end, **self._variables)
