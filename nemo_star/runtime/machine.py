"""What a measurement ran on, for the row that reports it."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from nemo_star import __version__
from nemo_star.runtime.locations import checkout
from nemo_star.runtime.transformer_engine import find_transformer_engine, installed_version

_DRIVER = Path("/proc/driver/nvidia/version")


def machine() -> dict[str, str | None]:
    """`commit` of the project and `machine`, in words."""
    return {"commit": _commit(), "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_device_name()}"}


def details() -> dict[str, str | int | None]:
    """`machine()`, and all else by which two measurements can differ: versions, devices, changes of the working tree.

    Imports Transformer Engine, where there is one, and takes hold of a GPU: for a process of its own.
    """
    has_gpu = torch.cuda.is_available()
    engine = find_transformer_engine()
    return {
        **machine(),
        "changes": _changes(),
        "gpus": torch.cuda.device_count() if has_gpu else 0,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if has_gpu else None,
        "driver": _driver() if has_gpu else None,
        "cuda": torch.version.cuda if has_gpu else None,
        "torch": str(torch.__version__),
        "transformer_engine": engine.version if engine.state == "working" else engine.state,
        "megatron_core": installed_version("megatron-core"),
        "nemo_star": __version__,
        "python": platform.python_version(),
    }


def _commit() -> str | None:
    """The project's commit, with a plus where the working tree differs; None outside a checkout."""
    folder = checkout()
    if folder is None:  # a repository around an installed package is not the project's
        return None
    said = _said(["git", "describe", "--always", "--dirty=+", "--abbrev=12"], folder)
    return said and said.strip()


def _changes() -> str | None:
    """A digest of what the working tree's files differ in from the commit; None where they do not."""
    folder = checkout()
    difference = _said(["git", "diff", "HEAD", "--binary"], folder) if folder else None
    return hashlib.sha256(difference.encode()).hexdigest()[:12] if difference else None


def _driver() -> str | None:
    """Version of NVIDIA's driver: torch knows only that of the CUDA interface."""
    said = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    if said is None and _DRIVER.exists():
        said = _DRIVER.read_text()
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", said or "")
    return found and found[0]


def _said(command: Sequence[str], folder: Path | None = None) -> str | None:
    """Standard output of a command; None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=True)
        return done.stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
