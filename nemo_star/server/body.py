"""Bodies of requests: bounded in size and time, validated without help from whoever sent them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.concurrency import run_in_threadpool
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from nemo_star.config.serve import ServerConfig
from nemo_star.server.errors import ApiError
from nemo_star.server.schemas import NOT_IMPLEMENTED

Model = TypeVar("Model", bound=BaseModel)
MIB = 2**20
_MAX_PROBLEMS = 5
_MAX_FORM_FIELDS = 20
_MAX_KEYS = 1000


async def read_json(request: Request, model: type[Model], limits: ServerConfig) -> Model:
    """The body as `model`.

    Raises:
        ApiError: 400, 408, 413, 415.
    """
    if _content_type(request) != "application/json":
        raise ApiError(415, "send JSON, with Content-Type: application/json")
    content = await _read(request, limits)
    return await run_in_threadpool(_validated, content, model)


async def read_form(request: Request, limits: ServerConfig) -> Mapping[str, Any]:
    """A multipart form: texts, and files as bytes, by field.

    Raises:
        ApiError: 400, 408, 413.
    """
    content = await _read(request, limits)

    async def stream() -> Any:
        yield content

    try:
        parser = MultiPartParser(
            request.headers,
            stream(),
            max_files=1,
            max_fields=_MAX_FORM_FIELDS,
            max_part_size=int(limits.max_body_mib * MIB),
        )
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, UnicodeError) as error:
        raise ApiError(400, f"the form cannot be read: {error}") from None
    try:
        return {name: value if isinstance(value, str) else await value.read() for name, value in form.multi_items()}
    finally:
        await form.close()  # its temporary files


def is_form(request: Request) -> bool:
    """Whether the body is a multipart form."""
    return _content_type(request) == "multipart/form-data"


def _validated(content: bytes, model: type[Model]) -> Model:
    try:
        values = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"Invalid JSON: {error}") from None
    # Each unknown field would be an error of its own.
    for each in [values, *(values.values() if isinstance(values, dict) else ())]:
        if isinstance(each, dict) and len(each) > _MAX_KEYS:
            raise ApiError(400, f"an object of {len(each)} fields: no object here has more than {_MAX_KEYS}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise problems(error) from None


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read(request: Request, limits: ServerConfig) -> bytes:
    """All of the body."""
    most = int(limits.max_body_mib * MIB)
    too_large = ApiError(413, f"the request is larger than the {limits.max_body_mib:g} MiB of server.max_body_mib")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                content += chunk
                if len(content) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {limits.body_seconds:g} s", retry=False) from None
    except ClientDisconnect:
        raise ApiError(400, "the connection ended within the body") from None
    return bytes(content)


def problems(error: ValidationError) -> ApiError:
    """Where the body is wrong, and what would be right; values are not repeated, they may be long."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    words = []
    for problem in found[:_MAX_PROBLEMS]:
        words.append(_in_words(problem))
    words = list(dict.fromkeys(words))
    if len(found) > _MAX_PROBLEMS:
        words.append(f"and {len(found) - _MAX_PROBLEMS} more")
    param = str(found[0]["loc"][0])[:100] if found[0]["loc"] else None
    text = "; ".join(words).encode("utf-8", "replace").decode()
    return ApiError(400, text, param=param)


def _in_words(problem: ErrorDetails) -> str:
    place, field = (
        ".".join(str(part)[:100] for part in problem["loc"]),
        str(problem["loc"][0]) if problem["loc"] else "",
    )
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown field"
    if field in NOT_IMPLEMENTED:
        return f"{field}: not implemented, other than with a value that changes nothing"
    if field == "prompt":
        return "prompt: give a text, a list of token ids, or a list of these"
    return f"{place}: {problem['msg']}" if place else "the body must be a JSON object"
