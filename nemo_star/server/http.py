"""The HTTP server in a thread of its own, beside the engine."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from nemo_star.server.errors import ApiError

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
        patience: a connection on which a request's headers, or the reading of an answer, take longer is closed.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, *, patience: float) -> None:
        protocol = type("Protocol", (_ImpatientProtocol,), {"patience": patience})
        settings = uvicorn.Config(
            app,
            http=protocol,
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
    """uvicorn waits for ever: for the rest of a request's headers, for the rest of a body that nobody reads because the
    answer has been given, for a client to read its answer. Here each may take `patience` seconds, unless something of
    the answer is read meanwhile."""

    patience: float
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel()
        self._cancel_unread()

    def pause_writing(self) -> None:
        """What was written is not read as fast; it waits in memory."""
        super().pause_writing()
        self._cancel_unread()
        self._unread = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_unread()

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP, as to every other mistake; where an answer is under way, it ends."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        content = json.dumps(ApiError(400, msg).body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def _is_owed(self) -> bool:
        """Whether what the client has begun to send is all that there is to wait for."""
        theirs, ours = self.conn.their_state, self.conn.our_state
        return theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours is h11.DONE)

    def _look(self) -> None:
        if not self._is_owed:
            self._cancel()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.patience, self._close)

    def _close(self) -> None:
        self._timer = None
        if self._is_owed and not self.transport.is_closing():
            self.transport.close()

    def _cancel_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
