"""Jobs on the HTTP server's side: who waits for what, how many there may be, what is left when a client goes away."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nemo_star.config.serve import ServerConfig
from nemo_star.server.errors import ApiError
from nemo_star.server.events import Answered, Encoded, Event, Failed, Token
from nemo_star.server.mail import Inbox
from nemo_star.server.metrics import Metrics
from nemo_star.server.orders import Ask, Cancel, Encode, Order

_RETRY_SECONDS = 5
"""Told to clients that come when all is full."""


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Group:
    """The jobs of one request; their events come in order."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.jobs: list[Job] = []
        self.deadline: asyncio.TimerHandle | None = None
        self._events: deque[tuple[int, Event]] = deque()
        self._wake = asyncio.Event()
        self._end: Exception | None = None

    def put(self, job: Job, event: Event) -> None:
        self._events.append((self.jobs.index(job), event))
        self._wake.set()

    def end_with(self, error: Exception) -> None:
        """Whoever waits for the next event gets this error instead, now and always; the first one stays."""
        self._end = self._end or error
        self._wake.set()

    async def next(self, patience: float | None = None) -> tuple[int, Event] | None:
        """The next event and the place of its job; None where none comes within `patience` seconds.

        Raises:
            ApiError: a job failed, or took too long.
            ClientGoneError: the client went away.
        """
        while not self._events and self._end is None:
            self._wake.clear()
            try:
                async with asyncio.timeout(patience):
                    await self._wake.wait()
            except TimeoutError:
                return None
        if self._end is not None:
            raise self._end
        place, event = self._events.popleft()
        if isinstance(event, Failed):
            raise ApiError(event.status, event.message, retry=event.status == 503)
        return place, event

    @property
    def is_done(self) -> bool:
        """All has been told."""
        return not self._events and all(job.has_ended for job in self.jobs)

    @property
    def cached_tokens(self) -> int:
        return sum(job.encoded.found_tokens for job in self.jobs if job.encoded is not None)

    @property
    def generated_tokens(self) -> int:
        return sum(job.generated_tokens for job in self.jobs)


class Job:
    """One order under way; its events come in order, `Answered` or `Failed` last."""

    def __init__(self, number: int, group: Group) -> None:
        self.number = number
        self.group = group
        self.began = time.perf_counter()
        self.is_waiting = True
        self.has_ended = False
        self.encoded: Encoded | None = None
        self.first_token_seconds: float | None = None
        self.last_token: dict[int, float] = {}
        self.generated_tokens = 0

    @property
    def timings(self) -> dict[str, float | None]:
        """Seconds, for whoever asked."""
        encoded, last = self.encoded, max(self.last_token.values(), default=None)
        rate = None
        if last is not None and self.first_token_seconds is not None and self.generated_tokens > 1:
            seconds = last - self.began - self.first_token_seconds
            rate = (self.generated_tokens - 1) / seconds if seconds > 0 else None
        return {
            "queue_seconds": None if encoded is None else encoded.queue_seconds,
            "prefill_seconds": None if encoded is None else encoded.prefill_seconds,
            "time_to_first_token_seconds": self.first_token_seconds,
            "decode_tokens_per_second": rate,
        }


class Jobs:
    """All jobs of the service; lives on the HTTP server's event loop. Other threads may call `open`, `close` and `len`,
    and `deliver`, `fail_all` and `order`, which hand over to it or to the engine.

    Args:
        inbox: where orders go.
    """

    def __init__(self, config: ServerConfig, inbox: Inbox, metrics: Metrics) -> None:
        self._config = config
        self._inbox = inbox
        self._metrics = metrics
        self._jobs: dict[int, Job] = {}
        self._of_owner: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed: str | None = "the model is being loaded"

    def bind(self) -> None:
        """The running event loop is the one that all this lives on."""
        self._loop = asyncio.get_running_loop()

    def open(self) -> None:
        """The engine takes orders from now on."""
        self._closed = None

    def close(self, reason: str) -> None:
        """No new jobs; those under way go on."""
        self._closed = reason

    def check_open(self) -> None:
        """Raises ApiError (503) where the service is not ready, or not any more."""
        if self._closed is not None:
            raise ApiError(503, f"not available: {self._closed}", retry=True, retry_after=_RETRY_SECONDS)

    @property
    def waiting(self) -> int:
        """Jobs whose turn has not come."""
        return sum(job.is_waiting for job in self._jobs.values())

    def __len__(self) -> int:
        return len(self._jobs)

    def check_room(self, owner: str, count: int) -> None:
        """Raises ApiError (429) where so many more would be too many, (503) where none are taken."""
        self.check_open()
        mine, limits = self._of_owner[owner], self._config
        most = min(limits.max_waiting, limits.max_requests_per_key)
        if count > most:
            raise ApiError(400, f"{count} prompts in one request: this service takes {most}", param="prompt")
        full = None
        if self.waiting + count > limits.max_waiting:
            full = f"{self.waiting} requests are waiting, {limits.max_waiting} may (server.max_waiting)"
        elif mine + count > limits.max_requests_per_key:
            most = limits.max_requests_per_key
            full = f"{mine} requests of this key are under way, {most} may be (server.max_requests_per_key)"
        if full is not None:
            raise ApiError(429, full, code="rate_limit_exceeded", retry=True, retry_after=_RETRY_SECONDS)

    @contextmanager
    def running(self, owner: str, orders: list[Callable[[int], Ask | Encode]]) -> Iterator[Group]:
        """Jobs from their orders, given their numbers, to their end; those that are left before are cancelled.

        Raises:
            ApiError: 429 or 503, before anything is ordered.
        """
        group = self.begin(owner, orders)
        try:
            yield group
        finally:
            self.end(group)

    def begin(self, owner: str, orders: list[Callable[[int], Ask | Encode]]) -> Group:
        """As `running`; whoever calls it must see to `end`."""
        self.check_room(owner, len(orders))
        group = Group(owner)
        for order in orders:
            job = Job(next(self._numbers), group)
            group.jobs.append(job)
            self._jobs[job.number] = job
            self._inbox.put(order(job.number))
        self._of_owner[owner] += len(orders)
        self._count()
        # Not asyncio.timeout: where a stream's reader is slow, that would cancel the task within what sends.
        seconds = self._config.request_seconds
        message = f"not done within {seconds:g} s (server.request_seconds)"
        late = ApiError(504, message, code="timeout", retry=False)
        group.deadline = asyncio.get_running_loop().call_later(seconds, group.end_with, late)
        return group

    def end(self, group: Group) -> None:
        """Nobody waits for these jobs any more."""
        if group.deadline is not None:
            group.deadline.cancel()
        for job in group.jobs:
            del self._jobs[job.number]
            if not job.has_ended:
                self._inbox.put(Cancel(job.number))
        self._of_owner[group.owner] -= len(group.jobs)
        if not self._of_owner[group.owner]:
            del self._of_owner[group.owner]
        self._count()

    def deliver(self, events: list[tuple[int, Event]]) -> None:
        """From the engine's thread: events of jobs."""
        self._call(self._deliver, events)

    def fail_all(self, message: str) -> None:
        """From another thread: no job will ever end."""
        self._call(self._fail_all, message)

    def order(self, order: Order) -> None:
        """What nobody waits for."""
        self._inbox.put(order)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has ended, and nobody listens
            return

    def _fail_all(self, message: str) -> None:
        self._closed = message
        for job in list(self._jobs.values()):
            if not job.has_ended:
                job.has_ended = True
                job.group.put(job, Failed(message, 503))

    def _deliver(self, events: list[tuple[int, Event]]) -> None:
        for number, event in events:
            job = self._jobs.get(number)
            if job is not None and not job.has_ended:
                self._note(job, event)
                job.group.put(job, event)
        self._count()

    def _note(self, job: Job, event: Event) -> None:
        """Keep count of what happens."""
        now, metrics = time.perf_counter(), self._metrics
        job.is_waiting = False
        if isinstance(event, Encoded):
            job.encoded = event
            metrics.queue_seconds.observe(event.queue_seconds)
            metrics.found_tokens.inc(event.found_tokens)
            metrics.encoded_tokens.inc(event.tokens - event.found_tokens)
            if event.prefill_seconds:
                metrics.prefill_seconds.observe(event.prefill_seconds)
        elif isinstance(event, Token):
            if job.first_token_seconds is None:
                job.first_token_seconds = now - job.began
                metrics.first_token_seconds.observe(job.first_token_seconds)
            if event.sample in job.last_token:
                metrics.token_seconds.observe(now - job.last_token[event.sample])
            job.last_token[event.sample] = now
            job.generated_tokens += 1
            metrics.generated_tokens.inc()
        elif isinstance(event, Failed):
            job.has_ended = True
            self._inbox.put(Cancel(job.number))
        elif isinstance(event, Answered):
            job.has_ended = True

    def _count(self) -> None:
        waiting = self.waiting
        self._metrics.waiting.set(waiting)
        self._metrics.running.set(len(self._jobs) - waiting)
