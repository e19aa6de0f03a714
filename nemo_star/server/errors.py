"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """Ends a request with this status.

    Args:
        code, param: what a program looks at: a word for the mistake, the field it is in.
        retry: whether trying again is of use; None: as clients think by themselves.
        retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry: bool | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self._code = code
        self._param = param
        self._retry = retry
        self._retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """JSON, of an answer or of an event in a stream."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self._param, "code": self._code}}

    @property
    def headers(self) -> dict[str, str]:
        """What tells a client whether to try again."""
        headers = {}
        if self._retry is not None:
            headers["x-should-retry"] = "true" if self._retry else "false"
        if self._retry_after is not None:
            headers["Retry-After"] = str(self._retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers
