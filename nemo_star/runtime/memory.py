"""Peak memory of this process (resident on CPU, allocated on CUDA), and memory that is free before it starts."""

from __future__ import annotations

import ctypes
import gc
import resource
import socket
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class FreeMemory:
    """What can still be taken from one memory; ranks that name the same `pool` share it."""

    pool: str
    size: int
    """Bytes."""


def free_memory(device: torch.device) -> FreeMemory:
    """Memory that this rank could take at most: its GPU's, or what its machine (or container) has with swap."""
    host = socket.gethostname()
    if device.type == "cuda":
        return FreeMemory(f"GPU {device.index} of {host}", torch.cuda.mem_get_info(device)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a container may not show how much was swapped
        size, swap = psutil.virtual_memory().available, psutil.swap_memory().free
    if _CGROUP_LIMIT.exists() and (limit := _CGROUP_LIMIT.read_text().strip()).isdigit():
        size = min(size, int(limit))  # swap comes on top of it
    return FreeMemory(f"the memory of {host}", size + swap)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement, where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (clear := Path("/proc/self/clear_refs")).exists():
        _give_back_freed()
        clear.write_text("5")


def _give_back_freed() -> None:
    """What the allocator keeps of freed memory (glibc) is no part of what comes next."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use at once since the start or the last reset (CUDA: on this device, by torch)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
