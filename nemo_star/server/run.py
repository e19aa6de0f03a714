"""`tools/serve.py`: rank 0 takes requests over HTTP and gives orders, all ranks carry them out."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from nemo_star.config.serve import ServeConfig
from nemo_star.contexts.store import ContextStore
from nemo_star.llm.opened import OpenedModel
from nemo_star.parallel.groups import on_first_rank
from nemo_star.runtime.launch import EXIT_INTERRUPTED, leave, warn
from nemo_star.runtime.memory import FreeMemory, free_memory
from nemo_star.server.app import make_app
from nemo_star.server.auth import Keys
from nemo_star.server.gate import LOOPBACK, log, log_to_stderr
from nemo_star.server.http import HttpThread, listening_socket
from nemo_star.server.jobs import Jobs
from nemo_star.server.loop import EngineLoop, control_group
from nemo_star.server.mail import Inbox, Outbox
from nemo_star.server.metrics import Metrics
from nemo_star.server.names import Names
from nemo_star.server.orders import Stop
from nemo_star.server.prompts import Prompts
from nemo_star.server.state import Service

_LOOK_SECONDS = 0.05
_TELL_SECONDS = 1.0
"""Clients have to hear of a failure before the process ends."""


def run(config: ServeConfig, free_memory: Callable[[torch.device], FreeMemory] = free_memory) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    Raises:
        ValueError, OSError: a user's error, before the weights are loaded, on all ranks alike.
    """
    with OpenedModel.opened(config, free_memory) as llm:
        llm.max_batch_size = config.inference.max_batch_size
        if llm.groups.dp.size() > 1:
            raise ValueError(
                f"{llm.groups.dp.size()} replicas: a service is one replica. Leave parallel.context_parallel_size to "
                "take all ranks, or start one service for each replica, behind a load balancer"
            )
        front: list[Front] = []
        on_first_rank(lambda: front.append(Front(config, llm)))
        llm.load_weights()
        store = llm.context_store()
        loop = EngineLoop(config, llm, store, control_group(llm.groups.replica), front[0] if front else None)
        if front:
            return front[0].serve(store, loop)
        # The first rank has the others stop when what is under way has ended; where it dies, they notice.
        signalled = threading.Event()
        _on_signals(lambda number, frame: signalled.set())
        try:
            loop.run()
        except BaseException:
            _end_by_signal(signalled)
            raise
        return 0


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _end_by_signal(signalled: threading.Event) -> None:
    """After a failure there is nothing left to end well: the launcher's signal counts again, also one that has come.
    A rank that has lost its peer waits for it (`run_as_tool`)."""
    _on_signals(signal.SIG_DFL)
    if signalled.is_set():
        timer = threading.Timer(_TELL_SECONDS, signal.raise_signal, [signal.SIGTERM])
        timer.daemon = True
        timer.start()


class Front:
    """Rank 0's side of HTTP, from before the weights are loaded.

    Raises:
        ValueError, OSError: an address that is taken, keys or names that cannot be read.
    """

    def __init__(self, config: ServeConfig, llm: OpenedModel) -> None:
        server = config.server
        keys = Keys(server.api_keys_file)
        listener = listening_socket(server.host, server.port)
        self.inbox = Inbox(lambda: self._http.check())
        self.metrics = Metrics()
        jobs = Jobs(server, self.inbox, self.metrics)
        self.outbox = Outbox(jobs.deliver)
        folder = None if config.cache.folder is None else Path(config.cache.folder)
        prompts = Prompts(config, server, llm.tokenizer, llm.description.model.vocab_size)
        self.service = Service(config, llm, keys, jobs, Names(folder), self.metrics, prompts)
        self._http = HttpThread(make_app(self.service), listener, patience=server.body_seconds)
        host, port = listener.getsockname()[:2]
        self._address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._draining = threading.Event()
        log_to_stderr()
        if server.host not in LOOPBACK and not keys.are_asked_for:
            warn(f"server.host={server.host}: whoever reaches this address may ask; give server.api_keys_file=FILE")
        self._http.start()

    def serve(self, store: ContextStore, loop: EngineLoop) -> int:
        """Take requests while the engine's loop runs; returns the exit code."""
        jobs = self.service.jobs
        self.service.store = store
        _on_signals(self._signalled)
        jobs.open()
        print(
            f"serving {self.service.model_name} at {self._address} "
            f"(OpenAI API at {self._address}/v1, page at {self._address}/)",
            file=sys.stderr,
            flush=True,
        )
        try:
            loop.run()
        except BaseException as error:
            log("engine failed", error=f"{type(error).__name__}: {error}")
            jobs.fail_all("the engine has failed; the service ends")
            time.sleep(_TELL_SECONDS)
            _end_by_signal(self._draining)
            raise
        self._http.stop()
        log("ended")
        return 0

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        """The first signal: no new requests, those under way may end. A second one: at once."""
        if self._draining.is_set():
            leave(EXIT_INTERRUPTED)
        self._draining.set()
        threading.Thread(target=self._drain, args=(signal.Signals(number).name,), name="drain", daemon=True).start()

    def _drain(self, reason: str) -> None:
        jobs, seconds = self.service.jobs, self.service.limits.drain_seconds
        jobs.close("the service is shutting down")
        log("draining", reason=reason, requests=len(jobs), seconds=seconds)
        until = time.monotonic() + seconds
        while len(jobs) and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
        if len(jobs):
            log("not drained in time", requests=len(jobs))
            jobs.fail_all("the service is shutting down")
            time.sleep(_TELL_SECONDS)
        self.inbox.put(Stop())
