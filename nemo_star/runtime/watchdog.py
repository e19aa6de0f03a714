"""Ends a job that hangs, and leaves alone one that works long.

A limit on every collective would cut honest work: a replica waits for the longest prefill of its round, ranks wait
while dense attention runs on one. So collectives have no limit of their own. Each rank counts its steps (layers,
requests); a thread notes in the job's store when there were some; when no rank of the job has made one for
`timeout_minutes`, all end.
On CUDA the host runs ahead of the device, and may wait for all that is queued in a single call: there a layer is a step
when the device has done it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import nn

from nemo_star.runtime.launch import (
    EXIT_ERROR,
    PEER_EXIT_SECONDS,
    environment_rank,
    environment_world_size,
    leave,
    warn,
)
from nemo_star.runtime.marks import Mark, mark
from nemo_star.runtime.store import connect

_MAX_LOOK_SECONDS = 10.0
_MAX_FAILED_LOOKS = 5
_RANKS_NAMED = 8


class Watchdog:
    """Counts this rank's steps and looks at everybody's, from before the process group is joined until the end.

    Args:
        connect: gives the store that all ranks share; None where this process is alone, and cannot wait for another.
        timeout_minutes: no step of any rank for so long is a hang.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store] | None,
        timeout_minutes: float,
        *,
        rank: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timeout_minutes = timeout_minutes
        self._connect = connect
        self._store: dist.Store | None = None
        self._rank = rank
        self._clock = clock
        self._steps = self._stored_steps = 0
        self._place, self._stored_place = "the start", ""
        self._queued: deque[tuple[str, Mark]] = deque()
        self._counting = threading.Lock()
        self._suspended = 0
        self._total, self._since, self._looked = -1, clock(), clock()
        self._interval = min(timeout_minutes * 60 / 4, _MAX_LOOK_SECONDS)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._connect is not None:
            self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._connect is not None:
            self._thread.join()

    def step(self, place: str) -> None:
        """This rank got as far as `place`."""
        self._steps += 1
        self._place = place

    def watch_layers(self, layers: nn.ModuleList, device: torch.device) -> None:
        """Count each pass of a layer as a step, when the device has done it; not where nobody looks."""
        if self._connect is None:
            return
        for number, layer in enumerate(layers, start=1):
            layer.register_forward_hook(lambda *_, place=f"layer {number} of its stage": self.passed(place, device))

    def passed(self, place: str, device: torch.device) -> None:
        """A layer was called, or something else that ends at `place` was given to the device."""
        if self._connect is None:
            return
        mark_after = mark(device)
        if mark_after is None:
            self.step(place)
        else:
            self._count_done()
            self._queued.append((place, mark_after))

    def _count_done(self) -> None:
        """Steps are those of the queued layers that the device has done. Two threads ask, of which one may wait."""
        with self._counting:
            while self._queued and self._queued[0][1].query():
                self.step(self._queued.popleft()[0])

    @contextmanager
    def suspended(self, place: str) -> Iterator[None]:
        """Time in which all is well however long it takes: reading what somebody types, loading weights."""
        self._suspended += 1
        self.step(place)
        try:
            yield
        finally:
            self._suspended -= 1
            self.step(f"after {place}")

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Time, within a suspended one, in which steps count again."""
        suspended, self._suspended = self._suspended, 0
        try:
            yield
        finally:
            self._suspended = suspended

    def is_hanging(self) -> bool:
        """Store that this rank made steps since the last look; whether no rank has made any for too long."""
        if self._store is None:
            assert self._connect is not None
            self._store = self._connect()
        self._count_done()
        steps, place, now = self._steps, self._place, self._clock()
        total = self._store.add("steps", int(self._suspended > 0 or steps != self._stored_steps))
        if place != self._stored_place:
            self._store.set(f"place/{self._rank}", place)
        self._stored_steps, self._stored_place = steps, place
        # A look that comes far too late: this process was stopped and continued, and perhaps the whole job.
        if total != self._total or now - self._looked > self.timeout_minutes * 30 + 2 * self._interval:
            self._total, self._since = total, now
        self._looked = now
        return now - self._since > self.timeout_minutes * 60

    def _look_on(self) -> None:
        failed = 0
        while not self._ended.wait(self._interval):
            try:
                hangs = self.is_hanging()
            except dist.DistError as error:
                failed += 1
                if failed == _MAX_FAILED_LOOKS:  # the store's process is gone, and the launcher ends this one
                    warn(f"rank {self._rank}: the watchdog lost the job's store and stops: {error}")
                    return
                continue
            failed = 0
            if hangs:
                self._end_job()

    def _end_job(self) -> None:
        """One rank says where each was last; all exit. The main thread waits in a collective for ever."""
        try:
            assert self._store is not None
            if self._store.add("speakers", 1) == 1:
                print(f"\nerror: {self.report()}", file=sys.stderr, flush=True)
            else:
                time.sleep(PEER_EXIT_SECONDS)
        finally:
            leave(EXIT_ERROR)

    def report(self) -> str:
        """What hangs, and where each rank was last."""
        assert self._store is not None
        ranks: dict[str, list[int]] = {}
        for rank in range(environment_world_size()):
            key = f"place/{rank}"
            place = self._store.get(key).decode() if self._store.check([key]) else "no sign of life"
            ranks.setdefault(place, []).append(rank)
        last = "; ".join(f"{_named(members)}: {place}" for place, members in ranks.items())
        return (
            f"no rank has made a step for {self.timeout_minutes:g} minutes (parallel.timeout_minutes): the job hangs. "
            f"Last seen at: {last}"
        )


def _named(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks[:_RANKS_NAMED])) + (", ..." if len(ranks) > _RANKS_NAMED else "")
    return f"rank{'s' * (len(ranks) > 1)} {names}"


def watchdog_of_this_job(timeout_minutes: float) -> Watchdog:
    """A watchdog on a connection of its own to the store that the launcher's environment names."""
    alone = environment_world_size() == 1
    return Watchdog(None if alone else partial(connect, "watchdog"), timeout_minutes, rank=environment_rank())
