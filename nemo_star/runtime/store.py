"""The launcher's key-value store, which all processes of a job reach."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

_SECONDS = 30.0


def connect(prefix: str) -> dist.Store:
    """A connection of one's own to the store that the launcher's environment names; keys lie under `prefix`."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_SECONDS))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"nemo_star/{prefix}/{attempt}", store)
