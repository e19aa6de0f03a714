"""Imports point one way: a room imports only what stands before it in the way of the data."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent.parent / "nemo_star"
ROOMS = (
    "runtime",
    "methods",
    "config",
    "parallel",
    "planning",
    "kernels",
    "attention",
    "models",
    "checkpoint",
    "engine",
    "contexts",
    "text",
    "llm",
    "offline",
    "server",
    "evaluation",
    "benchmarking",
    "commands",
)
"""Folders (and the front door, llm.py) in the way of the data: a room imports itself and what stands before it."""


def imports(file):
    """Dotted names, without `nemo_star.`, of the project's modules that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [node.module]
        else:
            continue
        yield from (name.removeprefix("nemo_star.") for name in names if name.startswith("nemo_star."))


FILES = [file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_what_stands_before_it(file):
    room = file.relative_to(PACKAGE).parts[0]
    for imported in imports(file):
        other = imported.partition(".")[0]
        assert ROOMS.index(other) <= ROOMS.index(room), f"{room} imports {imported}"


@pytest.mark.parametrize(
    "module", ["config.generate", "runtime.launch", "config.compose", "planning.report", "evaluation.tasks"]
)
def test_what_needs_no_torch_does_not_import_it(module):
    program = f"import sys, nemo_star.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
