"""Between the HTTP server's thread and the engine's, on rank 0."""

from __future__ import annotations

import queue
from collections.abc import Callable

from nemo_star.server.events import Event
from nemo_star.server.orders import Order

_LOOK_SECONDS = 1.0


class Inbox:
    """Orders for all ranks, put by any thread, taken by the engine's.

    Args:
        check: called now and then while the engine waits; raises where no order will ever come.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._check = check

    def put(self, order: Order) -> None:
        """The engine takes it between two of its steps."""
        self._orders.put(order)

    def take(self, *, wait: bool) -> list[Order]:
        """All orders there are, in order; with `wait` at least one."""
        orders: list[Order] = []
        while wait and not orders:
            self._check()
            try:
                orders.append(self._orders.get(timeout=_LOOK_SECONDS))
            except queue.Empty:
                continue
        while not self._orders.empty():
            orders.append(self._orders.get())
        return orders


class Outbox:
    """Events of jobs, collected during a step of the engine, handed over after it.

    Args:
        deliver: takes (job, event) pairs, on the engine's thread.
    """

    def __init__(self, deliver: Callable[[list[tuple[int, Event]]], None]) -> None:
        self._deliver = deliver
        self._events: list[tuple[int, Event]] = []

    def add(self, job: int, event: Event) -> None:
        """Say something to whoever waits for a job."""
        self._events.append((job, event))

    def flush(self) -> None:
        """Hand over what was collected."""
        if self._events:
            events, self._events = self._events, []
            self._deliver(events)
