"""A running service under load: streams one after another and side by side, the gap beside a prefill, many contexts.

A client over plain HTTP, so that it measures what clients see.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from nemo_star.evaluation.needles import NeedleDocument, make_document, question

_TIMEOUT_SECONDS = 3600
_TOKENS_OF_SENTENCE = 10.7
"""Of the filler, roughly; only to hit a length."""


@dataclass
class Streamed:
    """One answer as its client saw it."""

    began: float
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    """When each chunk with a token came."""
    cached_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def first_token_seconds(self) -> float:
        return self.arrivals[0] - self.began

    @property
    def gaps(self) -> list[float]:
        """Seconds between two tokens."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


class Client:
    """Of one service.

    Args:
        url: http://host:port.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.model: str = self.get("/v1/models")["data"][0]["id"]

    def get(self, path: str) -> dict[str, Any]:
        return self._json("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._json("POST", path, body)

    def metric(self, name: str) -> float:
        """One of /metrics, without labels."""
        with self._asked("GET", "/metrics") as response:
            for line in response.read().decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.rpartition(" ")[2])
        raise ValueError(f"the service has no metric {name}")

    def stream(self, query: str, *, tokens: int, context: str | None = None, ignore_eos: bool = True) -> Streamed:
        """One completion, greedy, on a named context or with its context in the query's text."""
        body = {
            "model": self.model,
            "prompt": query,
            "max_tokens": tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": 0,  # a chunk for each token, also where its text is held back
            "ignore_eos": ignore_eos,
        }
        if context is not None:
            body["context"] = context
        answer = Streamed(time.perf_counter())
        with self._asked("POST", "/v1/completions", body) as response:
            for chunk in _events(response):
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    answer.text += choice["text"]
                    if choice["logprobs"] is not None:
                        answer.arrivals.append(time.perf_counter())
                if (usage := chunk.get("usage")) is not None:
                    answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
                    answer.prompt_tokens = usage["prompt_tokens"]
                    answer.completion_tokens = usage["completion_tokens"]
        return answer

    def context(self, text: str) -> str:
        """Have a text encoded; its id, once it is there."""
        identity: str = self.post("/v1/contexts", {"text": text})["id"]
        while (state := self.get(f"/v1/contexts/{identity}"))["status"] in ("queued", "encoding"):
            time.sleep(0.02)
        if state["status"] != "ready":
            raise ValueError(f"encoding a context failed: {state['error']}")
        return identity

    def delete(self, identity: str) -> None:
        self._json("DELETE", f"/v1/contexts/{identity}")

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._asked(method, path, body) as response:
            return json.loads(response.read())

    def _asked(self, method: str, path: str, body: dict[str, Any] | None = None) -> closing[HTTPResponse]:
        connection = HTTPConnection(self._host, self._port, timeout=_TIMEOUT_SECONDS)
        connection.request(method, path, None if body is None else json.dumps(body), self._headers)
        response = connection.getresponse()
        if response.status >= 400:
            raise ValueError(f"{method} {path}: {response.status} {response.read().decode()}")
        return closing(response)


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


def side_by_side(client: Client, counts: list[int], *, tokens: int, contexts: int, context_tokens: int) -> list[Any]:
    """Streams one after another, then all at once, on a few contexts; each must have the same text both times."""
    documents = [_document(f"load {number}", context_tokens, needles=8) for number in range(contexts)]
    named = [client.context(document.text) for document in documents]
    rows = []
    for count in counts:
        asked: list[Callable[[], Streamed]] = []
        for number in range(count):
            keys = list(documents[number % contexts].needles)
            query, name = question(keys[number // contexts % len(keys)]), named[number % contexts]
            asked.append(lambda query=query, name=name: client.stream(query, tokens=tokens, context=name))  # type: ignore[misc]
        alone, alone_seconds = _timed(lambda asked=asked: [ask() for ask in asked])  # type: ignore[misc]
        with ThreadPoolExecutor(count) as pool:
            together, seconds = _timed(lambda asked=asked: list(pool.map(lambda ask: ask(), asked)))  # type: ignore[misc]
        different = sum(one.text != other.text for one, other in zip(alone, together, strict=True))
        rows.append(
            {
                "streams": count,
                "tokens_per_second_alone": count * tokens / alone_seconds,
                "tokens_per_second": count * tokens / seconds,
                "ratio": alone_seconds / seconds,
                "first_token_seconds": statistics.median(answer.first_token_seconds for answer in together),
                "longest_gap_seconds": max(gap for answer in together for gap in answer.gaps),
                "different_texts": different,
            }
        )
    for name in named:
        client.delete(name)
    return rows


def beside_a_prefill(client: Client, *, streams: int, tokens: int, context_tokens: int) -> dict[str, Any]:
    """The longest gap between two tokens of answers, alone, and while a long context is being encoded."""
    document = _document("gap", 2000, needles=1)
    (key,) = document.needles
    name = client.context(document.text)

    def streamed() -> list[Streamed]:
        with ThreadPoolExecutor(streams) as pool:
            return list(pool.map(lambda _: client.stream(question(key), tokens=tokens, context=name), range(streams)))

    alone = streamed()
    long = _document("long", context_tokens, needles=1)
    with ThreadPoolExecutor(1) as pool:
        began = time.perf_counter()
        encoding = pool.submit(client.context, long.text)
        beside = streamed()
        spent = time.perf_counter()
        identity = encoding.result()
        encoded = time.perf_counter()
    size = client.get(f"/v1/contexts/{identity}")["tokens"]
    for each in (identity, name):
        client.delete(each)
    return {
        "streams": streams,
        "context_tokens": size,
        "encoding_seconds": encoded - began,
        "answers_seconds": spent - began,
        "median_gap_seconds_alone": statistics.median(gap for answer in alone for gap in answer.gaps),
        "longest_gap_seconds_alone": max(gap for answer in alone for gap in answer.gaps),
        "median_gap_seconds": statistics.median(gap for answer in beside for gap in answer.gaps),
        "longest_gap_seconds": max(gap for answer in beside for gap in answer.gaps),
    }


def many_contexts(client: Client, *, requests: int, contexts: int, context_tokens: int, threads: int) -> dict[str, Any]:
    """Questions with known answers on several contexts, in no order, and the memory of rank 0 as it goes on."""
    documents = [_document(f"many {number}", context_tokens, needles=8) for number in range(contexts)]
    rng = random.Random("many contexts")
    asked = []
    for _ in range(requests):
        document = rng.choice(documents)
        asked.append((document, rng.choice(list(document.needles))))

    def right(pair: tuple[NeedleDocument, str]) -> tuple[bool, bool]:
        document, key = pair
        prompt = f"{document.text}\n\n{question(key)}"
        answer = client.stream(prompt, tokens=16, ignore_eos=False)
        return answer.text.strip() == document.needles[key], answer.cached_tokens > 0

    memory, found = [], []
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        for start in range(0, requests, max(1, requests // 10)):
            found += list(pool.map(right, asked[start : start + max(1, requests // 10)]))
            memory.append(client.metric("process_resident_memory_bytes"))
        seconds = time.perf_counter() - began
    return {
        "requests": requests,
        "contexts": contexts,
        "right": sum(is_right for is_right, _ in found),
        "from_cache": sum(cached for _, cached in found),
        "requests_per_second": requests / seconds,
        "resident_mib": [round(size / 2**20) for size in memory],
        "kv_bytes": client.metric("nemo_star_kv_bytes"),
        "kv_budget_bytes": client.metric("nemo_star_kv_budget_bytes"),
    }


def _document(seed: str, tokens: int, *, needles: int) -> NeedleDocument:
    return make_document(random.Random(seed), filler_sentences=int(tokens / _TOKENS_OF_SENTENCE), needles=needles)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began
