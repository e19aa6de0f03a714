"""How long calls take on a device, one contender beside the other.

All contenders of a shape run in turn, there and back, `repeats` times; a row has the median. CUDA is timed by events
around several calls, issued while the device is busy with something else, so that it does not wait for Python.

Some libraries make a plan for each length (cuDNN), and in decode each length comes once: contenders are warmed up at
another length, and a row has the first call at its own, too.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

SAMPLE_SECONDS, MAX_CALLS = 2e-3, 32
"""So many calls make a sample that it takes about so long."""
BUSY_BYTES, BUSY_TIMES = 2**28, 32
"""Written before a sample of several calls: 8.6 GB, 2.5 ms at an H100's data sheet's 3.35 TB/s."""

Contenders = dict[str, Callable[[], Any]]


@torch.inference_mode()
def first_calls(
    contenders: Contenders, shorter: Contenders, device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """(seconds of the first call by contender, reasons of those that do not run).

    Args:
        shorter: the same with a key less, which are run before: workspaces are made and code is loaded then.
    """
    first: dict[str, float] = {}
    withheld: dict[str, str] = {}
    for name, work in contenders.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a dozen of torch's for a backend that does not run
                shorter.get(name, work)()
                _synchronize(device)
                started = time.perf_counter()
                work()
                _synchronize(device)
                first[name] = time.perf_counter() - started
        except Exception as error:  # libraries refuse a shape with whatever they like
            withheld[name] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    return first, withheld


@torch.inference_mode()
def in_turn(contenders: Contenders, device: torch.device, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of the device, and of the host, by contender."""
    calls = {}
    for name, work in contenders.items():
        once, _ = seconds_of(work, device, calls=1)
        calls[name] = min(MAX_CALLS, max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-9))))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            times[name].append(seconds_of(contenders[name], device, calls=calls[name]))
    of_device, of_host = (
        {name: statistics.median(sample[which] for sample in samples) for name, samples in times.items()}
        for which in range(2)
    )
    return of_device, of_host


def seconds_of(work: Callable[[], Any], device: torch.device, *, calls: int) -> tuple[float, float]:
    """Of one call, from so many one after the other: the device's, and the host's until it returns."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            work()
        took = (time.perf_counter() - started) / calls
        return took, took
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _synchronize(device)
    if calls > 1:
        _keep_busy(device)
    before.record()
    started = time.perf_counter()
    for _ in range(calls):
        work()
    issued = time.perf_counter() - started
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / calls, issued / calls


def _keep_busy(device: torch.device) -> None:
    """Give the device a millisecond or more to do, so that calls wait in its queue and it never waits for Python."""
    filled = torch.empty(BUSY_BYTES, dtype=torch.uint8, device=device)
    for _ in range(BUSY_TIMES):
        filled.zero_()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
