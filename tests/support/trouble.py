"""Clients that misbehave, and what a service must look like when they have gone."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
from serving import Running

PATIENCE_SECONDS = 60
"""For what comes at once, unless it never comes."""
QUIET = ("requests_waiting", "requests_running", "answers_live", "encodings")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Look until it holds."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.01)


def is_quiet(server: Running, key: str = "") -> bool:
    """Nothing waits or runs, on either side of the service."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    lines = httpx.get(f"{server.address}/metrics", headers=headers, timeout=PATIENCE_SECONDS).text.splitlines()
    metrics = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return not any(float(metrics[f"nemo_star_{name}"]) for name in QUIET)


def is_error(response: httpx.Response) -> bool:
    """Whether the body is that of OpenAI's errors."""
    try:
        return is_error_body(response.json())
    except ValueError:
        return False


def is_error_body(body: object) -> bool:
    return (
        isinstance(body, dict)
        and set(body) == {"error"}
        and set(body["error"]) == {"message", "type", "param", "code"}
        and isinstance(body["error"]["message"], str)
    )


def connected(server: Running, *, buffer: int | None = None) -> socket.socket:
    """A connection; with a small receive buffer, where little is to be in flight unread."""
    place = urlsplit(server.address)
    connection = socket.socket()
    connection.settimeout(PATIENCE_SECONDS)
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect((place.hostname, place.port))
    return connection


def request_bytes(path: str, body: object = None, *headers: str, method: str = "POST") -> bytes:
    """A request with a JSON body, as it goes over the wire."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes, which it must."""
    content = b""
    try:
        while piece := connection.recv(2**16):
            content += piece
    except ConnectionResetError:
        pass
    return content


def status_and_body(raw: bytes) -> tuple[int, bytes]:
    """Of the first response in what was read."""
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


def events(response: httpx.Response) -> list[dict]:
    """Of a stream to its end."""
    data = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
    return [json.loads(event) for event in data if event != "[DONE]"]
