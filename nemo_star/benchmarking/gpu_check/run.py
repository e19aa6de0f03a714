"""`tools/gpu_check.py`: one step after the other, each in processes of its own, results on disk after each.

This process imports no torch and holds no GPU: what it knows of the machine, a child has told it.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_star.benchmarking.gpu_check.ledger import REPORT, Ledger, locked, log_file, rows_file
from nemo_star.benchmarking.gpu_check.markdown import section, told
from nemo_star.benchmarking.gpu_check.processes import (
    Ended,
    end_marked,
    environment_for,
    noted_signals,
    run_limited,
)
from nemo_star.benchmarking.gpu_check.steps import OUTPUT, Step, planned
from nemo_star.config.gpu_check import GpuCheckConfig
from nemo_star.runtime.launch import EXIT_ERROR, EXIT_INTERRUPTED
from nemo_star.runtime.locations import checkout

EXAMINE_SECONDS = 180
TAIL_LINES = 60
"""Of a log: torchrun writes some 25 after what a rank has said."""
_EXAMINE = "import json; from nemo_star.runtime.machine import details; print(json.dumps(details()))"


def run(config: GpuCheckConfig) -> int:
    """Carry out what the configuration asks for; the exit code."""
    planned(config)  # refuses what is wrong before anything is imported
    environment = environment_for(config.device)
    about = examine(environment)
    if config.device == "cuda" and not about["gpus"]:
        raise ValueError("no CUDA device is found (make doctor says more); --config-name gpu_check_tiny is for a CPU")
    if not about["transformer_engine"][0].isdigit():  # a state, and no release
        config = without_torch_linears(config)
    steps = planned(config)
    chosen = [step for step in steps if config.steps is None or step.name in config.steps]
    return carry_out(steps, chosen, Path(config.output).absolute(), about=about, environment=environment)


def without_torch_linears(config: GpuCheckConfig) -> GpuCheckConfig:
    """The same without an option that stands for Transformer Engine's layers, and is refused where there are none."""

    def plain(words: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(word.replace("+linears:torch", "") for word in words))

    return replace(config, compare=plain(config.compare), decode_compare=plain(config.decode_compare))


def examine(environment: Mapping[str, str]) -> dict[str, Any]:
    """Project, packages and machine, as `runtime.machine.details` has them.

    Raises:
        ValueError: it cannot be found out, torch being broken, say.
    """
    command = [sys.executable, "-c", _EXAMINE]
    try:
        done = subprocess.run(
            command,
            cwd=checkout(),
            env=dict(environment),
            capture_output=True,
            text=True,
            check=True,
            timeout=EXAMINE_SECONDS,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(error.stderr or "").strip().splitlines()[-1:]
        raise ValueError(f"the machine cannot be examined ({error}; {''.join(said)}): make doctor says more") from None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def carry_out(
    steps: Sequence[Step],
    chosen: Sequence[Step],
    folder: Path,
    *,
    about: Mapping[str, Any],
    environment: Mapping[str, str],
) -> int:
    """Run those of `steps` that are chosen and not done; results go to `folder`.

    Args:
        about: project, packages and machine; what was done with another one is run again.

    Returns:
        0: all chosen are done; 1: one is not; 130: a signal came.
    """
    with locked(folder), noted_signals() as is_stopped:
        ledger = Ledger(folder, steps, about)
        for mark in ledger.marks():
            end_marked(mark)
        ledger.settle()
        print(f"{told(about)}\nresults: {folder / REPORT}", flush=True)
        for number, step in enumerate(chosen, start=1):
            head = f"[{number}/{len(chosen)}] {step.name}"
            if ledger.is_done(step):
                print(f"{head}: is done", flush=True)
            elif not is_stopped():
                _run_one(step, head, ledger, folder, environment=environment, is_stopped=is_stopped)
        if is_stopped():
            return EXIT_INTERRUPTED
        return 0 if all(ledger.is_done(step) for step in chosen) else EXIT_ERROR


def _run_one(
    step: Step,
    head: str,
    ledger: Ledger,
    folder: Path,
    *,
    environment: Mapping[str, str],
    is_stopped: Callable[[], bool],
) -> None:
    """Run a step, note it, and say what it came to."""
    mark = uuid.uuid4().hex
    ledger.begin(step, mark=mark, started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    print(f"{head}: at most {step.limit_seconds:g} s", flush=True)
    ended = run_limited(
        _fresh_command(step, folder),
        mark,
        log=folder / log_file(step),
        environment=environment,
        limit_seconds=step.limit_seconds,
        is_stopped=is_stopped,
    )
    ledger.end(step, _outcome(step, ended, folder))
    print("\n".join(["", *section(ledger.record(step)), ""]), flush=True)


def _fresh_command(step: Step, folder: Path) -> list[str]:
    """The command; what an earlier run has left in the file of its rows is no result of this one."""
    output = folder / rows_file(step)
    output.unlink(missing_ok=True)
    return [sys.executable, *(word.replace(OUTPUT, str(output)) for word in step.command)]


def _outcome(step: Step, ended: Ended, folder: Path) -> dict[str, Any]:
    """What a record says of how a step ended; rows also of one that failed, as far as it came."""
    log = (folder / log_file(step)).read_text(encoding="utf-8", errors="replace")
    state, reason = ended.state, ended.reason
    try:
        rows = step.result.read(folder / rows_file(step), log)
        markdown = step.result.markdown(rows) if rows else []
        problem = step.result.problem(rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # of rows that are not what they should be
        rows, markdown, problem = [], [], f"its rows cannot be read: {error!r}"
    if state == "done" and problem:
        state, reason = "failed", problem
    tail = {} if state == "done" else {"log_tail": log.splitlines()[-TAIL_LINES:]}
    found = {"state": state, "reason": reason, "exit_code": ended.exit_code, "seconds": round(ended.seconds, 1)}
    return {**found, **tail, "rows": rows, "markdown": markdown}
