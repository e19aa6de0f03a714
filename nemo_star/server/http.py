"""The HTTP server in a thread of its own, beside the engine."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

_BACKLOG = 1024
_END_SECONDS = 5


def listening_socket(host: str, port: int) -> socket.socket:
    """Bound, so that an address that cannot be had is known before anything expensive.

    Raises:
        ValueError: it is taken, or not this machine's.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise ValueError(f"server.host={host} server.port={port}: cannot listen there: {error}") from error
    return listener


class HttpThread:
    """Serves an application until `stop`.

    Args:
        header_seconds: a connection whose request's headers take longer is closed.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, *, header_seconds: float) -> None:
        class Protocol(_ImpatientProtocol):
            patience = header_seconds

        settings = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_END_SECONDS,
        )
        self._server = uvicorn.Server(settings)
        self._listener = listener
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Begin to take requests."""
        self._thread.start()

    def check(self) -> None:
        """Raises RuntimeError where the thread has ended by itself."""
        if not self._thread.is_alive():
            raise RuntimeError(f"the HTTP server has ended: {self._failure}")

    def stop(self) -> None:
        """End what is open within a few seconds, and the thread."""
        self._server.should_exit = True
        self._thread.join(2 * _END_SECONDS)

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        except BaseException as error:
            self._failure = error


class _ImpatientProtocol(H11Protocol):
    """uvicorn waits for ever for the rest of a request's headers."""

    patience: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel()

    def _look(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._cancel()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.patience, self._close)

    def _close(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
