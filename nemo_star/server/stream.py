"""Server-sent events, with signs of life, until the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import Request

from nemo_star.server.errors import ApiError
from nemo_star.server.events import Event
from nemo_star.server.jobs import ClientGoneError, Group

SIGN_OF_LIFE = ": still at work\n\n"
"""A comment: every client's decoder drops it."""
END = "data: [DONE]\n\n"


def sse(value: dict[str, Any]) -> str:
    """One event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


@asynccontextmanager
async def watched(request: Request, group: Group) -> AsyncIterator[None]:
    """Time in which a client that goes away is noticed, also while nothing is sent."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.client_gone()

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
