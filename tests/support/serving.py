"""The service as users start it, for the time of a `with`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from launch import ENVIRONMENT, ROOT, SUPPORT

START_SECONDS = 120
END_SECONDS = 60


class Running:
    """A service that takes requests."""

    def __init__(self, process: subprocess.Popen, address: str, lines: list[str]) -> None:
        self.process = process
        self.address = address
        self.lines = lines
        """Of its standard error, as they come."""

    def metrics(self) -> dict[str, float]:
        """/metrics, by name with labels."""
        lines = httpx.get(f"{self.address}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def total(self, name: str) -> float:
        """A metric, summed over its labels."""
        return sum(value for key, value in self.metrics().items() if key.partition("{")[0] == name)


@contextmanager
def service(checkpoint: Path, *overrides: str, processes: int = 2, log: Path | None = None) -> Iterator[Running]:
    """The demo's recipe on a free port, with these overrides; ended by SIGTERM, of one process with exit code 0."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    tool = [ROOT / "tools/serve.py", "--config-name", "serve_demo", f"checkpoint={checkpoint}", "server.port=0"]
    command = [*(launcher if processes > 1 else [sys.executable]), *map(str, tool), *overrides]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    lines: list[str] = []
    address: list[str] = []
    there = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving \S+ at (http://\S+) ", line):
                address.append(found[1])
                there.set()
        there.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert there.wait(START_SECONDS), "".join(lines)
        assert address, "".join(lines)
        yield Running(process, address[0], lines)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            reader.join(END_SECONDS)
