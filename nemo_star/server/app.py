"""The application: routes, errors, the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from nemo_star import __version__
from nemo_star.server import completions
from nemo_star.server.contexts import Contexts
from nemo_star.server.errors import ApiError
from nemo_star.server.gate import Gate, internal_error
from nemo_star.server.schemas import ChatRequest, CompletionRequest, ContextRequest
from nemo_star.server.state import Service

PAGE = Path(__file__).parent / "page"


def make_app(service: Service) -> ASGIApp:
    """The service's ASGI application."""
    contexts = Contexts(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.jobs.bind()
        expiry = asyncio.create_task(contexts.expire())
        yield
        expiry.cancel()
        with suppress(asyncio.CancelledError):
            await expiry

    app = FastAPI(title="nemo_star", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(completions.routes(service))
    app.include_router(contexts.routes())
    _add_small_routes(app, service)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(Exception, _failed)  # FastAPI's own is a line of text; raised again, for the log
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return Gate(app, service)


def _add_small_routes(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html")

    @app.get("/health")
    async def health() -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Requests are taken."""
        service.jobs.check_open()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != service.model_name:
            message = f"the model {name[:200]!r} does not exist; this service has {service.model_name!r}"
            raise ApiError(404, message, code="model_not_found")
        return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "nemo_star",
        "max_model_len": service.limits.max_context_tokens or service.max_positions,
    }


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return JSONResponse(error.body, error.status, error.headers)
    if isinstance(error, RequestValidationError):
        return await _refused(request, ApiError(422, "the request's path or query is not what this route takes"))
    assert isinstance(error, HTTPException)
    refusal = ApiError(error.status_code, str(error.detail))
    return JSONResponse(refusal.body, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    failure = internal_error(request.state.note["id"], error)
    return JSONResponse(failure.body, failure.status, failure.headers)


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that routes read by themselves."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        models = [(model, "validation") for model in (ChatRequest, CompletionRequest, ContextRequest)]
        _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        app.openapi_schema = document
    return app.openapi_schema
