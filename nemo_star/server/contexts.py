"""`/v1/contexts`: long texts that are encoded once, and asked about by name."""

from __future__ import annotations

import asyncio
import time
from array import array
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from nemo_star.server.body import is_form, problems, read_form, read_json
from nemo_star.server.errors import ApiError
from nemo_star.server.events import Encoded, Progress
from nemo_star.server.gate import log
from nemo_star.server.jobs import ClientGoneError, Group
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
        self._groups: dict[str, Group] = {}
        self._tasks: set[asyncio.Task[None]] = set()

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
            if content in (b"", ""):
                raise ApiError(400, "the file is empty", param="file")
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
            raise problems(error) from None
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
        self._check_count(owner)
        ids: array[int] = await service.tokenized(owner, service.prompts.context, body.text or body.tokens or [])
        service.check_context(len(ids))
        self._check_count(owner)  # others may have come meanwhile; from here on nothing waits
        service.jobs.check_room(owner, 1)
        ttl = body.ttl_seconds or service.limits.context_ttl_seconds
        try:
            context = service.names.add(owner, body.name, ids, ttl)
        except ValueError as error:
            raise ApiError(409, str(error), code="context_exists", param="name", retry=False) from None
        except OSError as error:
            raise ApiError(507, f"the context cannot be written down: {error.strerror}", retry=False) from None
        group = service.jobs.begin(owner, [lambda job: Encode(job, owner, ids)])
        self._groups[context.id] = group
        task = asyncio.create_task(self._encode(context, group))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return context

    def delete(self, context: NamedContext) -> None:
        """End what is under way for it, and free what it takes, unless another one has the same text."""
        self._end(context)  # the engine has to hear of this first: what it would still encode it would keep
        if self._service.names.remove(context):
            self._service.jobs.order(Forget(context.owner, context.ids))

    def _end(self, context: NamedContext) -> None:
        group = self._groups.pop(context.id, None)
        if group is not None:
            group.end_with(ClientGoneError("deleted"))
            self._service.jobs.end(group)

    def _check_count(self, owner: str) -> None:
        most = self._service.limits.max_contexts_per_key
        if len(self._service.names.of(owner)) >= most:
            raise ApiError(429, f"{most} contexts of this key exist (server.max_contexts_per_key)", retry=False)

    async def expire(self) -> None:
        """Delete contexts whose time is over, for ever."""
        while True:
            await asyncio.sleep(EXPIRY_SECONDS)
            for context in self._service.names.expired():
                try:
                    self.delete(context)
                except OSError as error:  # of its files; others have their time, too
                    log("not deleted", context=context.id, error=str(error))

    def _found(self, owner: str, name: str) -> NamedContext:
        context = self._service.names.find(owner, name)
        if context is None:
            raise ApiError(404, f"there is no context {name[:200]!r}", code="context_not_found", param="context")
        return context

    async def _encode(self, context: NamedContext, group: Group) -> None:
        """To its end; what comes of it is kept in `context`."""
        try:
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
            self._end(context)
