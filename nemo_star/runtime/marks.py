"""Places in what a device was given to do, so that what it has done can be told from what waits in its queue."""

from __future__ import annotations

from typing import Protocol

import torch


class Mark(Protocol):
    """What torch.cuda.Event is here."""

    def query(self) -> bool:
        """Whether the device has got so far."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...


def mark(device: torch.device) -> Mark | None:
    """A mark after all that was given to the device so far; None where nothing waits (CPU), or all of it is only being
    recorded (a CUDA graph, in which an event could not be asked)."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
