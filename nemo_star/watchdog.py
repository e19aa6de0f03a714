"""Ends a job that hangs, and leaves alone one that works long.

A limit on every collective would cut honest work: a replica waits for the longest prefill of its round, ranks wait
while dense attention runs on one. So collectives have no limit of their own. Each rank counts its steps (layers,
requests); a thread tells the job's store when there were some; when no rank of the job has made one for
`timeout_minutes`, all end.
On CUDA a step is a layer handed to the device, which runs ahead of the device by what its queue holds.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

import torch.distributed as dist
from torch import nn

from nemo_star.launch import EXIT_ERROR, PEER_EXIT_SECONDS, environment_rank, leave

T = TypeVar("T")
_STORE_SECONDS = 30.0
_LONGEST_LOOK_SECONDS = 10.0
_GATHER_SECONDS = 2.0
_RANKS_NAMED = 8


class Watchdog:
    """Counts this rank's steps and looks at everybody's.

    Args:
        store: shared by all ranks; None where this process is alone, and nothing can hang on another.
        timeout_minutes: no step of any rank for so long is a hang.
        clock: seconds; for tests.
    """

    def __init__(
        self, store: dist.Store | None, timeout_minutes: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.timeout_minutes = timeout_minutes
        self._store = store
        self._clock = clock
        self._steps = self._told = 0
        self._place = "the start"
        self._patient = False
        self._total, self._since = -1, clock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._store is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._store is not None:
            self._thread.join()

    def step(self, place: str) -> None:
        """This rank got as far as `place`."""
        self._steps += 1
        self._place = place

    def follow(self, layers: nn.ModuleList) -> None:
        """Count each pass of a layer as a step."""
        for number, layer in enumerate(layers, start=1):
            layer.register_forward_hook(lambda *_, place=f"layer {number} of its stage": self.step(place))

    def patient(self, read: Callable[[], T]) -> Callable[[], T]:
        """`read`, during which all is well however long it takes: it waits for what somebody types or pipes in."""

        def reading() -> T:
            self._patient = True
            try:
                return read()
            finally:
                self._patient = False
                self.step("reading requests")

        return reading

    def is_hanging(self) -> bool:
        """Tell the store of this rank's steps since the last look; whether no rank has told of any for too long."""
        assert self._store is not None
        steps = self._steps
        total = self._store.add("steps", int(self._patient or steps != self._told))
        self._told = steps
        if total != self._total:
            self._total, self._since = total, self._clock()
        return self._clock() - self._since > self.timeout_minutes * 60

    def _look_on(self) -> None:
        interval = min(self.timeout_minutes * 60 / 4, _LONGEST_LOOK_SECONDS)
        while not self._ended.wait(interval):
            try:
                if self.is_hanging():
                    self._end_job()
            except dist.DistError:  # the store's process is gone, and the launcher ends this one
                return

    def _end_job(self) -> None:
        """One rank says where each was last; all exit. The main thread waits in a collective for ever."""
        assert self._store is not None
        rank = environment_rank()
        self._store.set(f"place/{rank}", self._place)
        if self._store.add("speakers", 1) == 1:
            time.sleep(_GATHER_SECONDS)
            print(f"\nerror: {self.report()}", file=sys.stderr, flush=True)
        else:
            time.sleep(PEER_EXIT_SECONDS)
        leave(EXIT_ERROR)

    def report(self) -> str:
        """What hangs, and where each rank was last."""
        assert self._store is not None
        ranks: dict[str, list[int]] = {}
        for rank in range(dist.get_world_size()):
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
    if dist.get_world_size() == 1:
        return Watchdog(None, timeout_minutes)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_STORE_SECONDS))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Watchdog(dist.PrefixStore(f"nemo_star/watchdog/{attempt}", store), timeout_minutes)
