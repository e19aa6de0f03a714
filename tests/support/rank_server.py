"""Ranks that start at once: forked from a process that has imported already what they need.

torchrun's ranks each import torch, Megatron-core and transformers: seconds of CPU a rank, with which the tests took a
third longer. Here a process imports them once; started by `launch.forked`, it reads a job a line (JSON) and answers
with its exit code. What torchrun itself does is tested with torchrun.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any


def serve(replies: int) -> None:
    """Run the jobs on stdin, one after another; `replies` is the file descriptor that answers go to."""
    import transformers.models.auto  # noqa: F401

    import nemo_star.evaluation.fidelity.run
    import nemo_star.evaluation.run  # noqa: F401

    for line in sys.stdin:
        threads = Path("/proc/self/task")
        assert not threads.exists() or len(list(threads.iterdir())) == 1, "a fork would lose the other threads"
        code = _run(json.loads(line), replies)
        os.write(replies, f"{code}\n".encode())


def _run(job: dict[str, Any], replies: int) -> int:
    """The first exit code of a rank that is not 0 (-9 out of time); ends the others then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = set()
    for rank in range(job["processes"]):
        if (pid := os.fork()) == 0:
            os.close(replies)
            _become(job, rank, port)
        ranks.add(pid)
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(pid, signal.SIGKILL) for pid in ranks])
    signal.alarm(job["timeout"])
    code = 0
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if (ended := os.waitstatus_to_exitcode(status)) and not code:
            code = ended
            for left in ranks:
                os.kill(left, signal.SIGTERM)
    signal.alarm(0)
    return code


def _become(job: dict[str, Any], rank: int, port: int) -> None:
    """Be this rank; never returns."""
    code = 1
    try:
        for descriptor, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
            opened = os.open(path, os.O_RDWR | os.O_APPEND)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.chdir(job["cwd"])
        world = {"WORLD_SIZE": job["processes"], "LOCAL_WORLD_SIZE": job["processes"], "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in world.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = job["arguments"]
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
