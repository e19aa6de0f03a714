"""Requests that are wrong or broken off: each gets its error, and the service is afterwards as it was before."""

import itertools
import json
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from hostile import CHAT, CONTEXTS, TEXT, known_cases, random_cases
from serving import service
from trouble import (
    connected,
    events,
    is_error,
    is_error_body,
    is_quiet,
    read_all,
    request_bytes,
    status_and_body,
    wait_until,
)

ASKED = {"messages": [{"role": "user", "content": "The weather is fine.\n\nWhat is it?"}], "max_tokens": 8}
LONG = "The weather of this day is like that of the day before it. " * 150
"""About 2,300 tokens."""
STREAM = {**ASKED, "stream": True, "ignore_eos": True, "max_tokens": 900, "logprobs": True, "top_logprobs": 20}
MIB = 2**20
STATUSES = {200, 202, 307, 400, 401, 403, 404, 405, 408, 409, 413, 415, 429}
"""Of answers to what may come; 507 and 5xx are not among them."""


class Hostile:
    """A service for two keys, and clients of both."""

    def __init__(self, server, keys):
        self.server = server
        self.keys = keys
        self.mine, self.other = (self.client(key) for key in keys)
        self.right = self.answer()

    def client(self, key):
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.server.address, headers=headers, timeout=60)

    def answer(self):
        response = self.mine.post(CHAT, json=ASKED)
        assert response.status_code == 200, response.text
        return response.json()["choices"]

    def send(self, case):
        request = self.mine.build_request(case.method, case.path, content=case.content, headers=case.headers)
        response = self.mine.send(request)
        assert response.status_code in STATUSES, (case.name, response.status_code, response.text)
        if response.headers["Content-Type"].startswith("text/event-stream"):
            assert response.status_code == 200, case.name
        elif response.status_code >= 400:
            assert is_error(response), (case.name, response.text)
        return response.status_code

    def raw(self, content):
        """Status and body of what is sent as it is, on a connection of its own."""
        with connected(self.server) as connection:
            connection.sendall(content)
            return status_and_body(read_all(connection))

    def check(self):
        """Nothing is left, and the next answer is right."""
        wait_until(lambda: is_quiet_with_key(self), "an empty queue")
        assert self.answer() == self.right
        assert self.server.process.poll() is None


def is_quiet_with_key(hostile):
    return is_quiet(hostile.server, hostile.keys[0])


@pytest.fixture(scope="module")
def hostile(demo, tmp_path_factory):
    keys = [secrets.token_urlsafe(32) for _ in range(2)]
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# two\n\n" + "\n".join(keys))
    settings = ["attention.block_size=256", "inference.tokens_to_generate=4", f"server.api_keys_file={file}"]
    limits = ["server.max_body_mib=1", "server.body_seconds=2", "server.max_requests_per_key=8"]
    limits += ["server.max_completion_tokens=900", "server.keepalive_seconds=0.1"]
    with service(demo, *settings, *limits) as server:
        yield Hostile(server, keys)


@pytest.fixture(autouse=True)
def _as_before(hostile):
    yield
    hostile.check()


def test_every_known_mistake_has_its_error(hostile):
    statuses = [hostile.send(case) for case in known_cases()]
    assert {400, 401, 403, 404, 405, 413, 415} <= set(statuses)


@pytest.mark.parametrize("count", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_fields_may_be_anything(hostile, count):
    statuses = [hostile.send(case) for case in itertools.islice(random_cases(f"fields {count}"), count)]
    assert 400 in statuses
    assert {200, 202} & set(statuses)


@pytest.mark.parametrize("examples", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_what_schemathesis_thinks_of(hostile, examples):
    """From the service's own description of itself, valid and invalid."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: pip install 'nemo-star[clients]'")
    from hypothesis import HealthCheck, errors, given, settings

    document = httpx.get(f"{hostile.server.address}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    asked = set()

    def check(case):
        headers = {"Authorization": f"Bearer {hostile.keys[0]}"}
        response = case.call(base_url=hostile.server.address, headers=headers, timeout=60)
        assert response.status_code in STATUSES, (response.status_code, response.text, case.as_curl_command())
        if response.status_code >= 400:
            assert is_error_body(response.json()), response.text
        asked.add((case.method, case.path))

    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            strategy = operation.as_strategy(generation_mode=mode)
            limits = {"max_examples": examples, "deadline": None, "suppress_health_check": list(HealthCheck)}
            with suppress(errors.Unsatisfiable):  # nothing can be wrong where nothing is given
                settings(derandomize=True, database=None, **limits)(given(strategy)(check))()
    assert len(asked) >= 10


def test_what_never_ends_is_closed(hostile):
    """Headers, bodies, and bodies that go on after their answer; all at once, since each takes body_seconds."""
    key = f"Authorization: Bearer {hostile.keys[0]}"
    json_type, chunked = "Content-Type: application/json", "Transfer-Encoding: chunked"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n"
    declared = f"{head}{key}\r\n{json_type}\r\nContent-Length: 1000\r\n\r\n"
    begun = {  # what is sent at once, what then now and again, the answer's status
        "nothing": ("", "", None),
        "headers": (head, "a", None),
        "second headers": ("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea", "a", 200),
        "body": (f'{declared}{{"messages"', " ", 408),
        "chunks": (f"{head}{key}\r\n{json_type}\r\n{chunked}\r\n\r\n", "1\r\n \r\n", 408),
        "body of a wrong type": (f"{head}{key}\r\nContent-Length: 1000\r\n\r\nx", "a", 415),
        "body without a key": (f"{head}{json_type}\r\nContent-Length: 1000\r\n\r\nx", "a", 401),
        "body of a GET": ("GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx", "a", 200),
    }

    def goes_on(begun):
        """Until the other side has had enough; what it said."""
        first, more, _ = begun
        answer = b""
        with connected(hostile.server) as connection, suppress(ConnectionError):
            connection.sendall(first.encode())
            connection.settimeout(0.2)
            while True:
                try:
                    piece = connection.recv(2**16)
                    answer += piece
                    if not piece:
                        break
                except TimeoutError:
                    connection.sendall(more.encode())
        return answer

    with ThreadPoolExecutor(len(begun)) as pool:
        answers = pool.map(goes_on, begun.values())
    for (name, (_, _, status)), answer in zip(begun.items(), answers, strict=True):
        assert (status_and_body(answer)[0] if answer else None) == status, (name, answer)


def test_a_body_that_is_too_large_is_not_read(hostile):
    key, json_type = f"Authorization: Bearer {hostile.keys[0]}", "Content-Type: application/json"
    head = f"POST {CONTEXTS} HTTP/1.1\r\nHost: localhost\r\n{key}\r\n{json_type}\r\nConnection: close\r\n"
    status, body = hostile.raw(f"{head}Content-Length: {10**15}\r\n\r\n{{".encode())
    assert status == 413
    assert is_error_body(json.loads(body))
    chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
    with connected(hostile.server) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(17):
            connection.sendall(chunk)
        assert status_and_body(read_all(connection))[0] == 413


def test_what_is_no_http_is_told_so(hostile):
    for content in (
        b"\x00\xff\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX Y: z\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 20_000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00",
    ):
        status, body = hostile.raw(content)
        assert status in (400, 403), content[:80]
        assert is_error_body(json.JSONDecoder().raw_decode(body.decode())[0]), body


def test_requests_in_a_row_on_one_connection_and_upgrades(hostile):
    key = f"Authorization: Bearer {hostile.keys[0]}"
    asked = request_bytes(CHAT, {**ASKED, "max_tokens": 2}, key)
    wrong = request_bytes(CHAT, {"messages": 1}, key)
    last = request_bytes(CHAT, {**ASKED, "max_tokens": 2}, key, "Connection: close")
    with connected(hostile.server) as connection:
        connection.sendall(asked + wrong + asked + last)
        answers = read_all(connection)
    assert [int(answer[:3]) for answer in answers.split(b"HTTP/1.1 ")[1:]] == [200, 400, 200, 200]
    upgrade = ["Connection: Upgrade, close", "Upgrade: websocket", "Sec-WebSocket-Key: eA=="]
    assert hostile.raw(request_bytes("/health", None, *upgrade, method="GET"))[0] == 200
    assert hostile.raw(request_bytes("/v1/nope", None, key, *upgrade, method="GET"))[0] == 404


def test_contexts_of_others_do_not_exist(hostile):
    mine = hostile.mine.post(CONTEXTS, json={"text": LONG, "name": "notes"}).json()
    for name in ("notes", mine["id"]):
        path = f"{CONTEXTS}/{name}"
        chat = {"messages": [{"role": "user", "content": "x"}], "context": name}
        missing = {**chat, "context": "none"}
        same = [
            (hostile.other.get(path), hostile.other.get(f"{CONTEXTS}/none")),
            (hostile.other.delete(path), hostile.other.delete(f"{CONTEXTS}/none")),
            (hostile.other.post(CHAT, json=chat), hostile.other.post(CHAT, json=missing)),
            (
                hostile.other.post(TEXT, json={"prompt": "x", "context": name}),
                hostile.other.post(TEXT, json={"prompt": "x", "context": "none"}),
            ),
        ]
        for found, expected in same:
            assert found.status_code == expected.status_code == 404
            assert found.text.replace(name, "none") == expected.text
    assert hostile.other.get(CONTEXTS).json()["data"] == []
    theirs = hostile.other.post(CONTEXTS, json={"text": LONG, "name": "notes"})
    assert theirs.status_code == 202  # the name is free, and nothing of the first one's K/V is found
    wait_until(lambda: hostile.other.get(f"{CONTEXTS}/notes").json()["status"] == "ready", "its context")
    assert hostile.other.get(f"{CONTEXTS}/notes").json()["cached_tokens"] == 0
    assert hostile.other.delete(f"{CONTEXTS}/notes").status_code == 200
    assert hostile.mine.get(f"{CONTEXTS}/notes").status_code == 200
    assert hostile.mine.delete(f"{CONTEXTS}/{mine['id']}").status_code == 200


def test_one_name_is_given_once(hostile):
    """Also to several who ask at the same time."""
    bodies = [{"text": LONG + str(number), "name": "one"} for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda body: hostile.mine.post(CONTEXTS, json=body), bodies))
    assert sorted(response.status_code for response in made) == [202, 409, 409, 409]
    assert hostile.mine.delete(f"{CONTEXTS}/one").status_code == 200
    assert "one" not in [context["name"] for context in hostile.mine.get(CONTEXTS).json()["data"]]


def long_chat(text, **values):
    return {**ASKED, "messages": [{"role": "user", "content": f"{text}{LONG * 2}\n\nWhat is it?"}], **values}


def test_whoever_goes_away_leaves_nothing(hostile):
    """In the headers, the body, the queue, prefill, and in the middle of an answer, streamed and not."""
    key = f"Authorization: Bearer {hostile.keys[0]}"
    whole = [request_bytes(CHAT, long_chat(str(i), **STREAM_ALONE), key) for i in range(3)]
    whole += [request_bytes(CHAT, {**STREAM, "stream": i % 2 == 0}, key) for i in range(4)]
    for content in whole:
        for part in (content[:20], content[: len(content) // 2], content[:-1]):
            with connected(hostile.server) as connection:
                connection.sendall(part)
    open_ones = [connected(hostile.server) for _ in whole]
    for connection, content in zip(open_ones, whole, strict=True):
        connection.sendall(content)
    open_ones[-1].settimeout(60)
    wait_until(lambda: not_quiet(hostile, "answers_live") and not_quiet(hostile, "encodings"), "all of them under way")
    for connection in open_ones:
        connection.close()


STREAM_ALONE = {"max_tokens": 900, "ignore_eos": True, "stream": True}


def not_quiet(hostile, name):
    return hostile.mine.get("/metrics").text.partition(f"\nnemo_star_{name} ")[2].partition("\n")[0] != "0.0"


def test_a_stream_that_nobody_reads_ends(hostile):
    key = f"Authorization: Bearer {hostile.keys[0]}"
    content = request_bytes(CHAT, {**STREAM, "n": 16, "temperature": 1.0}, key)
    with connected(hostile.server, buffer=4096) as connection:
        connection.sendall(content)
        wait_until(lambda: not_quiet(hostile, "answers_live"), "the answer under way")
        wait_until(lambda: is_quiet_with_key(hostile), "the end of a stream that is not read")
        assert not read_all(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_too_many_at_once_are_told_so_by_their_status(hostile):
    """Also those that come in the same moment; a stream that has begun with 200 has its place."""

    def ask(number):
        values = {**STREAM, "max_tokens": 30} if number % 2 else {**ASKED, "max_tokens": 30, "ignore_eos": True}
        response = hostile.mine.post(CHAT, json=values)
        if response.status_code == 429:
            assert response.headers["Retry-After"]
            assert response.headers["x-should-retry"] == "true"
            assert is_error(response)
        elif number % 2:
            assert not any("error" in event for event in events(response))
        return response.status_code

    with ThreadPoolExecutor(24) as pool:
        statuses = list(pool.map(ask, range(48)))
    assert set(statuses) == {200, 429}
    with ThreadPoolExecutor(24) as pool:
        texts = [f"{number} {LONG}" for number in range(24)]
        made = list(pool.map(lambda text: hostile.mine.post(CONTEXTS, json={"text": text}), texts))
    assert {response.status_code for response in made} == {202, 429}
    for context in hostile.mine.get(CONTEXTS).json()["data"]:
        wait_until(lambda: hostile.mine.get(f"{CONTEXTS}/{context['id']}").json()["status"] == "ready", "each context")  # noqa: B023
        assert hostile.mine.delete(f"{CONTEXTS}/{context['id']}").json()["deleted"]
