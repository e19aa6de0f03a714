"""`/v1/contexts`: long texts that are encoded once, and asked about by name."""

from __future__ import annotations

import asyncio
import time
from array import array
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from nemo_star.server.body import is_form, read_form, read_json
from nemo_star.server.errors import ApiError
from nemo_star.server.events import Encoded, Progress
from nemo_star.server.jobs import ClientGoneError
from nemo_star.server.names import NamedContext
from nemo_star.server.orders import Encode, Forget
from nemo_star.server.schemas import ContextRequest
from nemo_star.server.state import Service
from nemo_star.server.stream import all_events

EXPIRY_SECONDS = 1.0
"""Between two looks for contexts whose time is over."""


class Contexts:
    """Named contexts, and what has them encoded; lives on the HTTP server's event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def routes(self) -> APIRouter:
        router = APIRouter()
        documented = self._service.documented(ContextRequest)
        content = documented["openapi_extra"]["requestBody"]["content"]
        content["multipart/form-data"] = {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "name": {"type": "string"},
                    "ttl_seconds": {"type": "number"},
                },
            }
        }

        @router.post("/v1/contexts", status_code=202, **documented)
        async def create(request: Request) -> Response:
            self._service.jobs.check_open()
            body = await self._body(request)
            return JSONResponse((await self.create(request.state.owner, body)).public, status_code=202)

        @router.get("/v1/contexts")
        async def listed(request: Request) -> Response:
            found = [context.public for context in self._service.names.of(request.state.owner)]
            return JSONResponse({"object": "list", "data": found})

        @router.get("/v1/contexts/{name:path}")
        async def one(request: Request, name: str) -> Response:
            return JSONResponse(self._found(request.state.owner, name).public)

        @router.delete("/v1/contexts/{name:path}")
        async def delete(request: Request, name: str) -> Response:
            context = self._found(request.state.owner, name)
            self.delete(context)
            return JSONResponse({"id": context.id, "object": "context", "deleted": True})

        return router

    async def _body(self, request: Request) -> ContextRequest:
        limits = self._service.limits
        if not is_form(request):
            return await read_json(request, ContextRequest, limits)
        form = dict(await read_form(request, limits))
        content = form.pop("file", None)
        try:
            if isinstance(content, bytes):
                form["text"] = content.decode("utf-8-sig")
            elif content is not None:
                form["text"] = content
            if isinstance(form.get("ttl_seconds"), str):
                form["ttl_seconds"] = float(form["ttl_seconds"])
            return ContextRequest.model_validate(form)
        except UnicodeDecodeError as error:
            raise ApiError(
                400, f"the file is no UTF-8 text: {error.reason} at byte {error.start}", param="file"
            ) from None
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
            raise ApiError(400, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"[:500]) from None
        except ValueError:
            raise ApiError(400, "ttl_seconds must be a number", param="ttl_seconds") from None

    async def create(self, owner: str, body: ContextRequest) -> NamedContext:
        """A new context, which is encoded from now on.

        Raises:
            ApiError: 400, 409, 413, 429, 503.
        """
        service = self._service
        if (body.text is None) == (body.tokens is None):
            raise ApiError(400, "give either text (or a file), or tokens")
        if len(service.names.of(owner)) >= service.limits.max_contexts_per_key:
            most = service.limits.max_contexts_per_key
            raise ApiError(429, f"{most} contexts of this key exist (server.max_contexts_per_key)", retry=False)
        ids: array[int] = await run_in_threadpool(service.prompts.context, body.text or body.tokens or [])
        service.check_context(len(ids))
        service.jobs.check_room(owner, 1)
        ttl = body.ttl_seconds or service.limits.context_ttl_seconds
        try:
            context = service.names.add(owner, body.name, ids, ttl)
        except ValueError as error:
            raise ApiError(409, str(error), code="context_exists", param="name", retry=False) from None
        except OSError as error:
            raise ApiError(507, f"the context cannot be written down: {error.strerror}", retry=False) from None
        self._tasks[context.id] = asyncio.create_task(self._encode(context))
        return context

    def delete(self, context: NamedContext) -> None:
        """End what is under way for it, and free what it takes, unless another one has the same text."""
        if (task := self._tasks.pop(context.id, None)) is not None:
            task.cancel()
        if self._service.names.remove(context):
            self._service.jobs.order(Forget(context.owner, context.ids))

    async def expire(self) -> None:
        """Delete contexts whose time is over, for ever."""
        while True:
            await asyncio.sleep(EXPIRY_SECONDS)
            for context in self._service.names.expired():
                self.delete(context)

    def _found(self, owner: str, name: str) -> NamedContext:
        context = self._service.names.find(owner, name)
        if context is None:
            raise ApiError(404, f"there is no context {name[:200]!r}", code="context_not_found")
        return context

    async def _encode(self, context: NamedContext) -> None:
        """To its end; what comes of it is kept in `context`."""
        jobs = self._service.jobs
        try:
            async with jobs.running(context.owner, [lambda job: Encode(job, context.owner, context.ids)]) as group:
                async for item in all_events(group):
                    event: Any = None if item is None else item[1]
                    if isinstance(event, Progress):
                        context.status, context.progress = "encoding", event
                    elif isinstance(event, Encoded):
                        context.encoded = event
            context.status, context.used = "ready", time.time()
        except (ApiError, ClientGoneError) as error:
            context.status, context.error = "failed", str(error)
        finally:
            self._tasks.pop(context.id, None)
