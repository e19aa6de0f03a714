"""What the routes share: the model's limits, jobs, named contexts, counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from nemo_star.config.sampling import SamplingParams
from nemo_star.config.serve import ServeConfig, ServerConfig
from nemo_star.contexts.store import ContextStore
from nemo_star.llm.opened import OpenedModel
from nemo_star.server.auth import Keys
from nemo_star.server.errors import ApiError
from nemo_star.server.jobs import Jobs
from nemo_star.server.metrics import Metrics
from nemo_star.server.names import NamedContext, Names
from nemo_star.server.prompts import Prompt, Prompts

TOO_LONG = "context_length_exceeded"
T = TypeVar("T")


class Turns:
    """One at a time; owners in turn, however many each has waiting."""

    def __init__(self) -> None:
        self._all = asyncio.Lock()
        self._of_owner: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def of(self, owner: str) -> AsyncIterator[None]:
        """Time in which it is this owner's turn, and nobody else's."""
        mine = self._of_owner.setdefault(owner, asyncio.Lock())
        async with mine, self._all:
            yield


@dataclass
class Service:
    """One service, on rank 0.

    Args:
        store: from when the model is loaded; the HTTP side asks it for sizes only.
    """

    config: ServeConfig
    llm: OpenedModel
    keys: Keys
    jobs: Jobs
    names: Names
    metrics: Metrics
    prompts: Prompts
    store: ContextStore | None = None

    def __post_init__(self) -> None:
        self._turns = Turns()
        self.started = int(time.time())
        place = Path(str(self.config.checkpoint))
        self.model_name = self.config.server.model_name or place.resolve().name

    @property
    def limits(self) -> ServerConfig:
        return self.config.server

    @property
    def max_positions(self) -> int | None:
        """Context, query and answer together; None: the model does not say."""
        return self.llm.description.model.max_position_embeddings

    async def tokenized(self, owner: str, make: Callable[..., T], *arguments: Any) -> T:
        """What `make`, a method of `prompts`, makes in a thread; it is one at a time, and who waits for it is not a
        thread that others need to read their requests."""
        async with self._turns.of(owner):
            return await run_in_threadpool(make, *arguments)

    def used(self, owner: str, name: str) -> NamedContext:
        """The context that a request names.

        Raises:
            ApiError: 404.
        """
        context = self.names.find(owner, name)
        if context is None:
            raise ApiError(404, f"there is no context {name[:200]!r}", code="context_not_found", param="context")
        context.used = time.time()
        return context

    def check(self, prompt: Prompt, new_tokens: int, *, samples: int, may_shorten: bool) -> int:
        """Refuse what cannot run, before anything is computed; how many tokens the answer may have.

        Raises:
            ApiError: 400, 413.
        """
        self.check_context(len(prompt.context_ids))
        self._check_memory(prompt, new_tokens, samples)
        most = self.max_positions
        if most is None or self.limits.max_context_tokens is not None:
            return new_tokens
        room = most - prompt.tokens
        if room < 1 or (new_tokens > room and not may_shorten):
            raise ApiError(
                400,
                f"this model's maximum context length is {most} tokens; the prompt has {prompt.tokens}, and "
                f"{new_tokens} are asked for",
                code=TOO_LONG,
            )
        return min(new_tokens, room)

    def _check_memory(self, prompt: Prompt, new_tokens: int, samples: int) -> None:
        """Refuse a query and answers whose own K/V do not fit, whatever else is under way."""
        if self.store is None:
            return
        most, own = self.llm.max_own_tokens(self.store), samples * (len(prompt.query_ids) + new_tokens)
        if own > most:
            raise ApiError(
                413,
                f"{samples} answer(s) to a query of {len(prompt.query_ids)} tokens may come to {own} tokens, there is "
                f"memory for {most}: ask for fewer",
            )

    def check_context(self, tokens: int) -> None:
        """Refuse a context that is longer than the model was trained for, or does not fit.

        Raises:
            ApiError: 413.
        """
        allowed, trained = self.limits.max_context_tokens, self.max_positions
        if allowed is not None and tokens > allowed:
            message = f"the context has {tokens} tokens, more than the {allowed} of server.max_context_tokens"
            raise ApiError(413, message, code=TOO_LONG)
        if allowed is None and trained is not None and tokens >= trained:
            message = f"this model's maximum context length is {trained} tokens; the context has {tokens}"
            raise ApiError(413, message, code=TOO_LONG)
        if not tokens:
            return
        try:
            self.llm.check(tokens)
            if self.store is not None:
                self.store.check_size(tokens)
        except ValueError as error:
            raise ApiError(413, str(error), code=TOO_LONG) from None

    def check_stop(self, params: SamplingParams) -> None:
        """Raises ApiError (400) for strings to stop at where there is no text."""
        if self.llm.tokenizer is None and params.stop:
            raise ApiError(400, "stop needs text, and the checkpoint has no tokenizer", param="stop")

    def documented(self, model: type[BaseModel]) -> dict[str, Any]:
        """For a route's decorator: its body in the OpenAPI document, which FastAPI does not read itself."""
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
        return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}
