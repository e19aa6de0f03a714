"""How a user started this process, for what it says of its usage."""

from __future__ import annotations

import sys


def started_as(command: str) -> tuple[str, str]:
    """How to start `command` again as this process was started: as one process, and what torchrun is given.

    `python tools/plan.py` for a script, `python -m nemo_star plan` or `nemo-star plan` for the package.
    """
    script = sys.argv[0]
    if script.endswith("__main__.py"):
        return f"python -m nemo_star {command}", f"-m nemo_star {command}"
    if script.endswith(".py"):
        return f"python {script}", script
    return f"nemo-star {command}", f"-m nemo_star {command}"
