"""Server-sent events, with signs of life, until the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nemo_star.server.errors import ApiError
from nemo_star.server.events import Event
from nemo_star.server.jobs import ClientGoneError, Group

SIGN_OF_LIFE = ": still at work\n\n"
"""A comment: every client's decoder drops it."""
END = "data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Of a stream: nobody on the way holds it back."""


def sse(value: dict[str, Any]) -> str:
    """One event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class Stream(StreamingResponse):
    """Events of a request whose jobs run already, which end with the response, however it ends.

    An async generator that nobody goes on with, because its client has gone, comes to its `finally` some time later.
    """

    def __init__(self, events: AsyncIterator[str], jobs: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_HEADERS)
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._jobs:
            await super().__call__(scope, receive, send)


@asynccontextmanager
async def watched(request: Request, group: Group) -> AsyncIterator[None]:
    """Time in which a client that goes away is noticed, also while nothing is sent."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.end_with(ClientGoneError())

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def all_events(group: Group, *, patience: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
    """Events of a group's jobs, None when there was none for `patience` seconds, to the end of all jobs."""
    while not group.is_done:
        yield await group.next(patience)


async def told(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """A stream in which an error is an event, too."""
    try:
        async for event in events:
            yield event
    except ApiError as error:
        yield sse(error.body)
    except ClientGoneError:
        return
