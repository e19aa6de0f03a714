"""What a process knows and does before torch is imported: its rank, and speaking with one voice."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

EXIT_ERROR = 1
EXIT_BAD_LINES = 3
"""JSONL: every line was answered, some with an `error` field."""
_PEER_EXIT_SECONDS = 20


def environment_rank() -> int:
    """The rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def environment_world_size() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def warn(message: str) -> None:
    """A warning for the user, on standard error of rank 0."""
    if environment_rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def fail_together(error: BaseException | str) -> NoReturn:
    """End every rank over an error that all ranks meet alike: rank 0 prints it once.

    Were a silent rank to exit first, torchrun might end rank 0 before it printed: so the others wait to be ended.
    """
    if environment_rank() == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(_PEER_EXIT_SECONDS)
    leave(EXIT_ERROR)


def leave(code: int) -> NoReturn:
    """Exit without the interpreter's clean-up, which can hang in a process group whose peers are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def quiet_unless_first() -> Iterator[None]:
    """Silence standard output and error of all ranks but 0: configuration messages are the same on all."""
    if environment_rank() == 0:
        yield
        return
    saved = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as sink:
        sys.stdout = sys.stderr = sink
        try:
            yield
        finally:
            sys.stdout, sys.stderr = saved
