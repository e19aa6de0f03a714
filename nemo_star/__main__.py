"""The project's commands: `nemo-star COMMAND ...`, or `torchrun --nproc-per-node N -m nemo_star COMMAND ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from nemo_star import __version__
from nemo_star.runtime.launch import quiet_unless_first, run_as_tool
from nemo_star.runtime.program import started_as

COMMANDS = {
    "generate": "answer questions about long contexts (torchrun for several ranks)",
    "chat": "a conversation about one long text (torchrun for several ranks)",
    "serve": "an OpenAI-compatible service over HTTP (torchrun for several ranks)",
    "convert": "checkpoints from Hugging Face's format, and back",
    "plan": "memory and time of a long context before anything runs",
    "benchmark": "attention methods on random weights (torchrun for several ranks)",
    "benchmark-serve": "a running service under load, as its clients see it",
    "benchmark-kernels": "attention kernels of this machine against torch's own",
    "gpu-check": "doctor, tests, kernels, a model and its decode on this GPU, resumable",
    "evaluate": "what attention methods cost in accuracy (torchrun for several ranks)",
    "fidelity": "how near attention methods come to dense attention, without labels (torchrun for several ranks)",
    "harness": "tasks of lm-evaluation-harness (torchrun for several ranks)",
    "needles": "questions with known answers for generate, and their score",
    "compare-dumps": "each layer's output in two runs with debug.dump",
    "doctor": "what is installed, what works, which attention kernel would run",
}
"""Name -> what it does; its `main` is in nemo_star/commands/."""


def main(arguments: Sequence[str]) -> int:
    """Run the command that the first argument names. Raises ValueError for one that is unknown."""
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help", "--version"):
        with quiet_unless_first():
            print(f"nemo_star {__version__}" if command == "--version" else overview())
        return 0
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}; known: {', '.join(COMMANDS)}")
    # Only the one that is asked for: others may import what takes seconds.
    module = importlib.import_module(f"nemo_star.commands.{command.replace('-', '_')}")
    return module.main(rest)


def overview() -> str:
    """All commands, a line each."""
    alone, under_torchrun = started_as("COMMAND")
    lines = [
        f"usage: {alone} ...",
        f"       torchrun --nproc-per-node N {under_torchrun} ...",
        "",
        *(f"  {name:<18} {what}" for name, what in COMMANDS.items()),
        "",
        f"{started_as('COMMAND --help')[0]} explains one of them.",
    ]
    return "\n".join(lines)


def run() -> NoReturn:
    """The console script `nemo-star`."""
    run_as_tool(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    run()
