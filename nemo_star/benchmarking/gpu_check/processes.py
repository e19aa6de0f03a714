"""A step's processes: one log, one limit, and all of them gone when the step is over."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from nemo_star.runtime.locations import checkout

MARK = "NEMO_STAR_GPU_CHECK_STEP"
"""In the environment of a step's processes: which step's. A process group would miss ranks, which torchrun starts in
sessions of their own (torch.distributed.elastic's SubprocessHandler), and ends of checks that were killed."""
GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""
_POLL_SECONDS = 0.1

State = Literal["done", "failed", "timed out", "interrupted"]


@dataclass(frozen=True)
class Ended:
    """How a step ended."""

    state: State
    seconds: float
    exit_code: int | None
    """None where it was ended from here."""
    reason: str | None


def run_limited(
    command: Sequence[str],
    mark: str,
    *,
    log: Path,
    environment: Mapping[str, str],
    limit_seconds: float,
    is_stopped: Callable[[], bool],
) -> Ended:
    """Run a command in a session of its own, output in `log`, until it ends, its time is over, or `is_stopped`.

    Whatever it has started and left is ended, too.
    """
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=checkout(),  # whose tests run; without one, where this process is
            env={**environment, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None and not is_stopped() and time.monotonic() - started < limit_seconds:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
            code, seconds = process.returncode, time.monotonic() - started
        finally:
            left = end_marked(mark)
            process.poll()  # nothing remains to be waited for
    state, reason = _judged(code, limit_seconds, is_stopped())
    if left:
        reason = f"{reason or 'over'}; processes {left} could not be ended"
    return Ended(state, seconds, code, reason)


def _judged(code: int | None, limit_seconds: float, stopped: bool) -> tuple[State, str | None]:
    if code is None:
        return (
            ("interrupted", "interrupted") if stopped else ("timed out", f"exceeded its limit of {limit_seconds:g} s")
        )
    if code < 0:
        return "failed", f"ended by {signal.Signals(-code).name}"
    return ("done", None) if code == 0 else ("failed", f"exit code {code}")


def end_marked(mark: str) -> list[int]:
    """SIGTERM, and after a while SIGKILL, to all processes of a step; those that outlive both (in a driver, say)."""
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):  # twice: a process may just have started another
        processes = list(_marked(mark))
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(number)
        psutil.wait_procs(processes, timeout=GRACE_SECONDS)
    return [process.pid for process in _marked(mark)]


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # others' processes, and those that have just ended
            if process.environ().get(MARK) == mark:
                yield process


@contextmanager
def noted_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT, SIGTERM and SIGHUP are noted instead of ending this process; what is yielded says whether one has come.
    One that is ignored (nohup) stays so."""
    asked: list[int] = []
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, lambda got, _: asked.append(got)) for number in numbers}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment_for(device: str) -> dict[str, str]:
    """Of a step's processes; on CPU without GPUs to see. Unbuffered, so that a log has all that was said."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**os.environ, **hidden, "PYTHONUNBUFFERED": "1"}
