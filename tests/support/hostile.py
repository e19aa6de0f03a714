"""Requests that are wrong, in every way that is known, and as many more as are wanted: the same ones every time."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

CHAT, TEXT, CONTEXTS = "/v1/chat/completions", "/v1/completions", "/v1/contexts"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "a line\n\na question"}], "max_tokens": 2},
    TEXT: {"prompt": "a line\n\na question", "max_tokens": 2},
    CONTEXTS: {"text": "a line of a context", "name": "hostile", "ttl_seconds": 1.0},
}
FIELDS = {
    CHAT: "model stream stream_options n temperature top_p top_k stop seed ignore_eos context return_progress user "
    "metadata store frequency_penalty logit_bias messages max_completion_tokens max_tokens logprobs top_logprobs "
    "chat_template_kwargs continue_final_message response_format modalities tools tool_choice unknown",
    TEXT: "model stream stream_options n temperature top_p top_k stop seed context prompt max_tokens logprobs echo "
    "query_tokens suffix best_of logit_bias unknown",
    CONTEXTS: "text tokens name ttl_seconds unknown",
}
HALF = "\ud800"
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 33, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.5, -0.5, 1e-300, 1e300),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "x", "\x00", HALF, f"a{HALF}b", "\udfff", "\U0010ffff", "￾", "../../etc/passwd", "ctx_", "x" * 5000, "\n\n"),
    *([], [None], [0], [-1], [2**31], [[]], [[0], ["x"]], [1.5], ["x", 1], ["\x00"] * 17, [""], [HALF], [[[]]], [{}]),
    *({}, {"x": 1}, {HALF: 1}, {"": {}}, {"self": 1}, {"messages": []}, {"chat_template": "{{ 1 }}"}),
    *({"type": "json_object"}, {"include_usage": 1}, {"enable_thinking": [{}]}, {str(i): i for i in range(2000)}),
    *([{"role": "user"}], [{"role": [], "content": "x"}], [{"role": "user", "content": HALF}], [{"content": "x"}]),
    *([{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "user", "content": {"text": "x"}}]),
    *(
        [{"role": "assistant", "content": "x"}],
        [{"role": "tool", "content": None}],
        [{"role": "system", "content": "x"}],
    ),
]


@dataclass(frozen=True)
class Case:
    """One request."""

    method: str
    path: str
    content: bytes = b""
    headers: dict[str, str | bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Enough of it to tell which one it was."""
        return f"{self.method} {self.path[:80]} {self.headers} {self.content[:200]!r}"


def a_json(path: str, body: Any, **headers: str) -> Case:
    """Half surrogate pairs are written as escapes, NaN and Infinity as Python does."""
    return Case("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})


def raw_json(path: str, content: bytes, kind: str = "application/json") -> Case:
    return Case("POST", path, content, {"Content-Type": kind})


def known_cases() -> Iterator[Case]:
    """Each kind of mistake once."""
    for path in BODIES:
        for content in (
            b"",
            b"{",
            b"null",
            b"[]",
            b"1",
            b'"x"',
            b"\xff\xfe{}",
            b'{"a":1,}',
            b'{"text":"\xff"}',
            b"\x00",
        ):
            yield raw_json(path, content)
        for opening, closing in ((b"[", b"]"), (b'{"messages":', b"}")):
            yield raw_json(path, opening * 100_000 + b"1" + closing * 100_000)
            yield raw_json(path, opening * 100_000)
        yield raw_json(path, b'{"max_tokens":' + b"9" * 10_000 + b"}")
        yield raw_json(path, b'{"prompt":[' + b",".join([b"{}"] * 100_000) + b"]}")
        yield raw_json(path, b"{" + b",".join(b'"k%d":1' % i for i in range(50_000)) + b"}")
        yield raw_json(path, b'{"text":"' + b"x" * 2**20 + b'"}')
        for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/json/x", "\xff"):
            yield Case("POST", path, json.dumps(BODIES[path]).encode(), {"Content-Type": kind.encode("latin-1")})
        for method in ("PUT", "PATCH", "OPTIONS", "TRACE", "BREW"):
            yield Case(method, path)
    yield from _forms()
    yield from _addresses()
    for host in ("evil.example", "[::1", "", "localhost@evil.example", "\xff", "127.0.0.1.evil.example", "x" * 5000):
        yield Case("GET", "/health", headers={"Host": host.encode("latin-1")})
    for origin in ("https://evil.example", "null", "http://[x", "\xff", "file://"):
        yield Case("GET", "/v1/models", headers={"Origin": origin.encode("latin-1")})
        yield Case("DELETE", f"{CONTEXTS}/x", headers={"Origin": origin.encode("latin-1")})
    for key in ("", "x", "Bearer", "Bearer x", "Basic eDp5", "Bearer \xff", f"Bearer {'x' * 10_000}"):
        yield Case("GET", CONTEXTS, headers={"Authorization": key.encode("latin-1")})
        yield Case("POST", CHAT, b"{}", {"Authorization": key.encode("latin-1"), "Content-Type": "application/json"})


def _forms() -> Iterator[Case]:
    part, end = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n', b"--x--\r\n"
    file = part % (b"file", b'; filename="\xff\x00"', b"text \xff\xfe")
    good = part % (b"file", b'; filename="x"', b"ok \x00")
    bodies = [b"", b"xx", b"--x--", b"--x\r\n\r\n\r\n--x--", file, file + end, part % (b"file", b"", b"ok")]
    bodies += [part % (b"\\ud800", b"", b"\\ud800") + end, part % (b"+2AA-", b"", b"+2AA-") + end]
    bodies += [part % (b"name", b"", b"x") * 50 + end, good * 3 + end]
    bodies += [good + part % (b"ttl_seconds", b"", seconds) + end for seconds in (b"nan", b"-1", b"x")]
    bodies += [good + part % (b"name", b"", name) + end for name in (b"", b"\xff", b"x" * 300)]
    for body in bodies:
        for kind in ("", "; boundary=x", "; boundary=x; charset=unicode_escape", "; boundary=x; charset=utf-7"):
            yield raw_json(CONTEXTS, body, f"multipart/form-data{kind}")


def _addresses() -> Iterator[Case]:
    up = (
        "..",
        "%2e%2e",
        "..%2f..%2f..%2fetc/passwd",
        "%2fetc%2fpasswd",
        "/etc/passwd",
        "%00",
        "%ff",
        "..%5c",
        "a" * 5000,
    )
    for path in itertools.chain((f"/page/{name}" for name in up), (f"/page/{name}/app.py" for name in up)):
        yield Case("GET", path)
    for name in ("", "%00", "%ff", "%ed%a0%80", "nope", "a" * 5000, "..%2f..%2fx", "ctx_0", "%"):
        for method in ("GET", "DELETE"):
            yield Case(method, f"{CONTEXTS}/{name}")
        yield Case("GET", f"/v1/models/{name}")
    for path in ("/nope", "//", "/docs", "/redoc", "/v1", "/favicon.ico", "/metrics/x", "/v1/chat/completions?a=%ff"):
        yield Case("GET", path)


def random_cases(seed: str) -> Iterator[Case]:
    """Good bodies in which one or two fields are anything at all; for ever."""
    chance = random.Random(seed)
    while True:
        path = chance.choice(list(BODIES))
        body = dict(BODIES[path])
        for name in chance.sample(FIELDS[path].split(), chance.randint(1, 2)):
            body[name] = chance.choice(VALUES)
        case = a_json(path, body)
        if chance.random() < 0.1:  # bytes that somebody broke on the way
            content = bytearray(case.content)
            content[chance.randrange(len(content))] = chance.randrange(256)
            case = raw_json(path, bytes(content))
        yield case
