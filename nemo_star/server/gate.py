"""What every request passes: who it is from, whether this is the place it was meant for, the log."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any
from urllib.parse import SplitResult, urlsplit
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemo_star.server.auth import NOBODY
from nemo_star.server.errors import ApiError
from nemo_star.server.state import Service

_LOG = logging.getLogger("nemo_star.server")
_OPEN = ("/health", "/ready", "/", "/favicon.ico", "/openapi.json")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
}


def log_to_stderr() -> None:
    """One JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    _LOG.handlers = [handler]
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False


def log(event: str, *, level: int = logging.INFO, **values: Any) -> None:
    """A line of the log."""
    _LOG.log(level, event, extra={"values": values})


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        values = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        values |= getattr(record, "values", {})
        if record.exc_info:
            values["error"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


def internal_error(request_id: str, error: Exception) -> ApiError:
    """A mistake of ours; the log has the rest, under this id."""
    return ApiError(500, f"internal error {request_id}: {type(error).__name__}", retry=False)


def _split(address: str) -> SplitResult:
    """Nothing where it is no address: urllib raises for half an IPv6 one."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


class Gate:
    """ASGI middleware around the whole application.

    Where the service listens on the loopback alone, requests must be for it by that name, so that no web page reaches
    it under a name of its own (DNS rebinding); one from a web page must be from the service's.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._only_loopback = service.limits.host in LOOPBACK

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note: dict[str, Any] = {"id": uuid4().hex, "method": scope["method"], "path": scope["path"][:200]}
        began, status, has_begun = time.perf_counter(), 500, False

        async def sending(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = note["id"]
                for name, value in _SECURITY.items():
                    headers[name] = value
            await send(message)

        try:
            scope.setdefault("state", {})
            scope["state"]["note"] = note
            scope["state"]["owner"] = self._admitted(scope)
            note["owner"] = scope["state"]["owner"][:8]
            await self._app(scope, receive, sending)
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, sending)
        except Exception as error:
            _LOG.exception("failed", extra={"values": note})
            if not has_begun:
                failure = internal_error(note["id"], error)
                await JSONResponse(failure.body, 500, failure.headers)(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._service.metrics.requests.labels(route, status).inc()
            if route not in ("/health", "/ready", "/metrics"):
                log("request", **note, status=status, seconds=round(time.perf_counter() - began, 4))

    def _admitted(self, scope: Scope) -> str:
        """The owner."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._only_loopback and (_split(f"//{host}").hostname or "") not in LOOPBACK:
            raise ApiError(403, "this service is for its own machine: call it by localhost or 127.0.0.1")
        if origin is not None and _split(origin).netloc != host:
            raise ApiError(403, "requests of other sites' pages are not taken")
        path = scope["path"]
        if path in _OPEN or path.startswith("/page/"):
            return NOBODY
        return self._service.keys.owner(headers.get("authorization"))
