"""What is asked, as token ids: a context, which is encoded once, and a query, which sees all of it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nemo_star.config.llm import LLMConfig, check_template_kwargs
from nemo_star.config.serve import ServerConfig
from nemo_star.server.errors import ApiError
from nemo_star.server.schemas import ChatRequest
from nemo_star.text.chat import split_messages
from nemo_star.text.ids import check_ids, check_text, is_unicode
from nemo_star.text.messages import BREAKPOINT, QueryNotFoundError, read_contents, start_of_question
from nemo_star.text.tokenizer import Tokenizer

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)
"""For a tokenizer without a chat template: a base model goes on with the messages, one paragraph each."""
QUERY_TOKENS = 256
"""Of a prompt in token ids, where nothing says more."""
MAX_SCORED_LOGITS = 2**28
"""Logits of all tokens of a prompt lie in memory at once, 4 bytes each."""


@dataclass(frozen=True)
class Prompt:
    """Ready to be ordered."""

    context_ids: array[int]
    """May be empty: attention is exact among the query's tokens."""
    query_ids: list[int]

    @property
    def tokens(self) -> int:
        return len(self.context_ids) + len(self.query_ids)


class Prompts:
    """Makes prompts of requests, in worker threads, one at a time (`Service.tokenized` sees to that).

    Raises (all its methods):
        ApiError: 400, or 413 for what is too long; names what would be right.
    """

    def __init__(self, config: LLMConfig, limits: ServerConfig, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._variables = config.chat_template_kwargs
        self._limits = limits
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        if tokenizer is not None and not getattr(tokenizer.hf, "chat_template", None):
            tokenizer.hf.chat_template = PLAIN_TEMPLATE
        self._before = [] if tokenizer is None else tokenizer.encode_query("a")

    def chat(self, request: ChatRequest, context_ids: array[int] | None) -> Prompt:
        """Messages in the chat template; after a named context where `context_ids` has its tokens."""
        with _refused("messages"):
            variables = {**(self._variables or {}), **(request.chat_template_kwargs or {})}
            check_template_kwargs(variables)
            if context_ids is not None:
                return self._checked(context_ids, self._turns(request, variables))
            try:
                context, query = split_messages(
                    self._tokenizer,
                    request.messages,
                    template_kwargs=variables,
                    continue_final_message=request.continue_final_message,
                )
            except QueryNotFoundError:
                return self._checked([], self._rendered(request, variables))
            return self._checked(context, query)

    def text(self, prompt: str, context_ids: array[int] | None) -> Prompt:
        """Plain text: its last paragraph is the query, unless it all comes after a context."""
        with _refused("prompt"):
            check_text("prompt", prompt, self._tokenizer)
            assert self._tokenizer is not None
            if context_ids is not None:
                return self._checked(context_ids, self._tokenizer.encode_query(prompt))
            start = start_of_question(prompt)
            if start is None:
                return self._checked([], self._tokenizer.encode_context(prompt))
            context, query = self._tokenizer.encode_cut(prompt, start)
            bos = self._tokenizer.bos_token_id
            return self._checked(([] if bos is None else [bos]) + context, query)

    def ids(self, prompt: list[int], query_tokens: int | None, context_ids: array[int] | None) -> Prompt:
        """Token ids, as they are."""
        with _refused("prompt"):
            check_ids("prompt", prompt, self._vocab_size)
            if context_ids is not None:
                return self._checked(context_ids, prompt)
            query = min(query_tokens or QUERY_TOKENS, len(prompt))
            return self._checked(prompt[: len(prompt) - query], prompt[len(prompt) - query :])

    def whole(self, prompt: str | list[int]) -> Prompt:
        """All of a short prompt as the query: its tokens can be scored."""
        with _refused("prompt"):
            if isinstance(prompt, str):
                check_text("prompt", prompt, self._tokenizer)
                assert self._tokenizer is not None
                ids = self._tokenizer.encode_context(prompt)
            else:
                check_ids("prompt", prompt, self._vocab_size)
                ids = prompt
            if len(ids) * self._vocab_size > MAX_SCORED_LOGITS:
                most = MAX_SCORED_LOGITS // self._vocab_size
                raise ApiError(413, f"echo takes prompts of up to {most} tokens, not {len(ids)}", param="prompt")
            return self._checked([], ids)

    def context(self, text: str | list[int]) -> array[int]:
        """Tokens of a named context; a text is the beginning of the chat template's first message."""
        with _refused("text" if isinstance(text, str) else "tokens"):
            if not isinstance(text, str):
                check_ids("context", text, self._vocab_size)
                ids = text
            else:
                check_text("context", text, self._tokenizer)
                assert self._tokenizer is not None
                ids = self._tokenizer.encode_context(text, chat_template=True, template_kwargs=self._variables)
            return array("i", ids)

    def token_text(self, token: int) -> str:
        """Of one token, special ones written out."""
        if self._tokenizer is None:
            return str(token)
        special = self._tokenizer.special_tokens.get(token)
        if special is not None:
            return special
        # After another token: by itself, one of SentencePiece loses the blank that it begins with.
        return self._tokenizer.decode([*self._before, token]).removeprefix(self._tokenizer.decode(self._before))

    def text_of(self, ids: list[int]) -> str | None:
        """Of tokens, special ones left out."""
        return None if self._tokenizer is None else self._tokenizer.decode(ids)

    def _checked(self, context: array[int] | list[int], query: list[int]) -> Prompt:
        if not query:  # the next token is predicted from something
            query, context = [int(i) for i in context[-1:]], context[:-1]
        if not query:
            raise ApiError(400, "the prompt holds no token", param="prompt")
        most = self._limits.max_query_tokens
        if len(query) > most:
            raise ApiError(
                413,
                f"the query, which is what comes after the context, has {len(query)} tokens, more than the {most} of "
                "server.max_query_tokens: put a blank line before the question, mark the part before it with "
                "prompt_cache_breakpoint, or make the long text a context (POST /v1/contexts)",
                code="query_length_exceeded",
            )
        return Prompt(context if isinstance(context, array) else array("i", context), query)

    def _rendered(self, request: ChatRequest, variables: Mapping[str, Any]) -> list[int]:
        assert self._tokenizer is not None
        goes_on = request.continue_final_message
        messages = read_contents(request.messages, continue_final_message=goes_on)
        end = {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
        text = self._tokenizer.render(messages, **end, **variables)
        return [i for part in self._tokenizer.encode_cut(text, 0) for i in part]

    def _turns(self, request: ChatRequest, variables: Mapping[str, Any]) -> list[int]:
        """Tokens after a named context, which the first message begins with: questions and answers in turn."""
        if self._tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer: give token ids (/v1/completions) instead of messages")
        if request.continue_final_message:
            raise ValueError("continue_final_message does not go together with a named context")
        if any(part.get(BREAKPOINT) for message in request.messages for part in _parts(message)):
            raise ValueError(f"{BREAKPOINT} does not go together with a named context, which ends by itself")
        messages = read_contents(request.messages)
        roles = [message["role"] for message in messages]
        if roles != [("user", "assistant")[number % 2] for number in range(len(roles))] or len(roles) % 2 == 0:
            raise ValueError(
                "after a named context, messages are those of user and assistant in turn, the user's first and last; "
                f"their roles are {', '.join(roles)}"
            )
        texts = [message["content"] or "" for message in messages]
        turns = list(zip(texts[::2], [*texts[1::2], ""], strict=True))
        return self._tokenizer.encode_turns(turns, template_kwargs=variables)


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


@contextmanager
def _refused(param: str) -> Iterator[None]:
    """A ValueError within becomes an ApiError (400)."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ApiError(400, text if is_unicode(text) else repr(text), param=param) from error
