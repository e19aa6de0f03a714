"""What a measurement ran on, for the row that reports it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from nemo_star.runtime.locations import checkout


def machine() -> dict[str, str | None]:
    """`commit` of the project and `machine`, in words."""
    return {"commit": _commit(), "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_device_name()}"}


def _commit() -> str | None:
    """The project's commit, with a plus where the working tree differs; None outside a checkout."""
    folder = checkout()
    if folder is None:  # a repository around an installed package is not the project's
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
