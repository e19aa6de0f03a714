"""Worker of `launch.generate_many`: several runs of tools/generate.py in one set of processes."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tools"))

import generate
import torch.distributed as dist
from hydra._internal.hydra import Hydra
from torch.distributed import distributed_c10d as c10d

from nemo_star.kernels import few_rows, numba_kernel
from nemo_star.runtime.launch import run_as_tool

MIN_BYTES, MIN_NUMBERS = numba_kernel.MIN_BYTES, few_rows.MIN_NUMBERS
# Hydra composes each recipe once more, only to see whether it asks for --multirun: a third of the time of a small run.
Hydra.get_mode = lambda *_, **__: None


def one(arguments):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            code, message = generate.main(arguments), None
        except (ValueError, OSError) as error:
            code, message = 1, str(error)
    drop_groups()
    return {"code": code, "error": message, "stderr": errors.getvalue()}


def drop_groups():
    """Destroy the groups of a run: a hundred runs would have a thousand threads."""
    if not dist.is_initialized():
        return
    dist.barrier()
    for group in list(c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def main():
    runs = Path(sys.argv[1])
    results = []
    for number, arguments in enumerate(json.loads(runs.read_text())):
        is_compiled = number % 2 == 1  # every other run decodes by Numba's code
        numba_kernel.MIN_BYTES = 1 if is_compiled else MIN_BYTES
        few_rows.MIN_NUMBERS = 1 if is_compiled else MIN_NUMBERS
        results.append(one(arguments))
    if os.environ["RANK"] == "0":
        runs.with_name(runs.name + ".results").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    run_as_tool(main)
