"""Starting the tools as users do, and many runs of one tool in a single launch (a start takes 10 s and more)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return _run([*launcher, *map(str, arguments)], **options)


def _run(
    command: list[str],
    *,
    cwd: Path | None = None,
    stdin: str = "",
    timeout: int = 300,
    gpu: bool = False,
    packages: Path | None = None,
):
    environment = dict(os.environ if gpu else ENVIRONMENT)
    paths = [packages, SUPPORT, os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    return subprocess.run(
        command, cwd=cwd, input=stdin, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def generate_many(processes: int, runs: list[list[str]], folder: Path, **options) -> list[dict]:
    """Run tools/generate.py with each of `runs` (argument lists) in one launch; options as for `torchrun`.

    Returns per run {"code", "error", "stderr"}, the last being rank 0's.
    """
    (folder / "runs.json").write_text(json.dumps(runs))
    done = torchrun(
        processes, ROOT / "tests/workers/run_generate.py", folder / "runs.json", **{"timeout": 600, **options}
    )
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
