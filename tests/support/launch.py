"""Starting the tools as users do, and, since a start takes 10 s and more, ranks forked from a process that has imported
everything, and many runs of one tool in a single launch."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent.parent
SUPPORT = Path(__file__).resolve().parent
"""Found by the workers, as pytest finds it (pyproject.toml)."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Tools run on CPU, also on a machine with GPUs: there may be fewer of them than ranks in a test."""


def run_tool(*arguments: object, **options):
    """`python tools/...`, output captured; options as for `torchrun`."""
    return _run([sys.executable, *map(str, arguments)], **options)


def torchrun(processes: int, *arguments: object, **options):
    """`torchrun --nproc-per-node N ...`, output captured.

    Options: cwd; stdin, a text; timeout in seconds; gpu, to let the processes see GPUs; packages, a folder of packages
    that are found before the installed ones.
    """
    # Of its own: two launches beside each other would want the same port.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return _run([*launcher, *map(str, arguments)], **options)


def forked(processes: int, script: Path, *arguments: object, cwd: Path | None = None, timeout: int = 600):
    """A script on ranks that start at once (`rank_server`), output captured as by `torchrun`."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = {name: Path(folder) / name for name in ("stdout", "stderr")}
        for output in outputs.values():
            output.touch()
        job = {
            "processes": processes,
            "arguments": [str(script), *map(str, arguments)],
            "cwd": str(cwd or Path.cwd()),
            "timeout": timeout,
            **{name: str(output) for name, output in outputs.items()},
        }
        to_server, replies = _rank_server()
        print(json.dumps(job), file=to_server, flush=True)
        code = int(replies.readline())
        return subprocess.CompletedProcess(
            job["arguments"], code, **{name: output.read_text() for name, output in outputs.items()}
        )


@functools.cache
def _rank_server() -> tuple[IO[str], IO[str]]:
    """What its jobs are written to and its answers read from; it ends with this process."""
    reads, writes = os.pipe()
    server = subprocess.Popen(
        [sys.executable, SUPPORT / "rank_server.py", str(writes)],
        stdin=subprocess.PIPE,
        env=_environment(),
        text=True,
        pass_fds=[writes],
    )
    os.close(writes)
    assert server.stdin is not None
    return server.stdin, os.fdopen(reads)


def _environment(*, gpu: bool = False, packages: Path | None = None) -> dict[str, str]:
    environment = dict(os.environ if gpu else ENVIRONMENT)
    paths = [packages, SUPPORT, os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    return environment


def _run(
    command: list[str],
    *,
    cwd: Path | None = None,
    stdin: str = "",
    timeout: int = 300,
    gpu: bool = False,
    packages: Path | None = None,
):
    environment = _environment(gpu=gpu, packages=packages)
    return subprocess.run(
        command, cwd=cwd, input=stdin, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def generate_many(processes: int, runs: list[list[str]], folder: Path, **options) -> list[dict]:
    """Run tools/generate.py with each of `runs` (argument lists) in one launch; with options, those of `torchrun`.

    Returns per run {"code", "error", "stderr"}, the last being rank 0's.
    """
    (folder / "runs.json").write_text(json.dumps(runs))
    command = processes, ROOT / "tests/workers/run_generate.py", folder / "runs.json"
    done = torchrun(*command, **{"timeout": 600, **options}) if options else forked(*command)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "runs.json.results").read_text())


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def selected(request, *names: str) -> set:
    """Values of these parameters (a tuple, if there are several) in the tests of the fixture's module that will run:
    what no test asks for is not run in the launch that they share."""
    found = set()
    for item in request.session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if item.module is request.module and all(name in params for name in names):
            values = tuple(params[name] for name in names)
            found.add(values[0] if len(names) == 1 else values)
    return found
