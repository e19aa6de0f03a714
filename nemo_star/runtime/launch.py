"""What a process knows and does before torch is imported: its rank, and speaking with one voice."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_BAD_LINES = 3
"""JSONL: every line was answered, some with an `error` field."""
PEER_EXIT_SECONDS = 20
"""How long a rank with nothing to say waits to be ended by the launcher."""
_LAUNCHERS = (
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
)
"""Variables of other launchers: number of processes, rank, rank on the machine."""
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def environment_rank() -> int:
    """The rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def environment_local_rank() -> tuple[int, int]:
    """The rank among the processes of this machine, and their number; (0, 1) without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def environment_world_size() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launcher() -> None:
    """Refuse an environment in which processes that were started together would not find each other or themselves.

    torchrun sets what is needed. srun and mpirun set names of their own, with which each process would take itself to
    be alone, and all of them the first GPU.

    Raises:
        ValueError: names what is missing, and where it comes from under these launchers.
    """
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if "RANK" in os.environ and missing:
        raise ValueError(f"RANK is set, {', '.join(missing)} not: torchrun sets all, under another launcher you do")
    for launcher, number, rank, local_rank in _LAUNCHERS:
        if missing and int(os.environ.get(number) or "1") > 1:
            raise ValueError(
                f"{launcher} started {os.environ[number]} processes, which know of each other by {', '.join(needed)}: "
                f"set RANK=${rank} LOCAL_RANK=${local_rank} and the others in each, or let it start one torchrun a node"
            )


def warn(message: str) -> None:
    """A warning for the user, on standard error of rank 0."""
    if environment_rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def run_as_tool(main: Callable[[], int]) -> NoReturn:
    """Run a tool's `main` and exit with its code; a user's error is printed once, and every rank exits non-zero.

    All ranks meet such an error alike, so rank 0 speaks. Were a silent rank to exit first, torchrun might end rank 0
    before it has spoken: the others wait to be ended, and speak themselves if nobody ends them.
    """
    try:
        leave(main())
    except KeyboardInterrupt:
        leave(EXIT_INTERRUPTED)
    except SystemExit as exit:  # Hydra's, after it printed what is wrong
        code, message = exit.code if isinstance(exit.code, int) else EXIT_ERROR, None
    except (ValueError, OSError) as error:
        code, message = EXIT_ERROR, f"error: {error}"
    except Exception as error:
        _leave_after_failure(error)
    rank = environment_rank()
    if rank > 0 and code != 0:
        time.sleep(PEER_EXIT_SECONDS)
        message = message and f"rank {rank}: {message}"
    if message:
        print(message, file=sys.stderr, flush=True)
    leave(code)


def _leave_after_failure(error: Exception) -> NoReturn:
    """A failure of this rank is reported at once, with its traceback.

    One that only says that another rank is gone waits: the launcher names that rank and its signal, and ends this one.
    """
    rank = environment_rank()
    if any(sign in str(error) for sign in _LOST_PEER):
        time.sleep(PEER_EXIT_SECONDS)
        print(f"rank {rank}: lost its connection to another rank", file=sys.stderr, flush=True)
    else:
        report = "".join(traceback.format_exception(error))
        print(f"rank {rank} failed: {type(error).__name__}: {error}\n{report}", file=sys.stderr, flush=True)
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
