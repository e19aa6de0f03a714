"""Imports point one way: each module imports only what stands before it in the way of the data."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "nemo_star"
ORDER = [
    {"config", "launch", "targets"},
    {"shape"},
    {"cli", "distributed", "partition", "rotary", "memory", "watchdog", "machine", "te_support"},
    {"flops", "planning.config"},
    {"decode_slices"},
    {"planning.work"},
    {"planning.memory"},
    {"planning.time", "planning.limit"},
    {"planning.plan"},
    {"planning.published", "planning.measured"},
    {"planning"},
    {"attention.merge"},
    {"attention.parts", "attention.vector_code"},
    {"attention.streaming_code"},
    {"attention.streaming"},
    {"attention.te"},
    {"attention.kernels", "cache"},
    {"attention.anchor"},
    {"attention.core"},
    {"attention.star", "attention.dense", "attention.ring", "attention.ulysses"},
    {"attention"},
    {"layer_spec", "sequence_parallel"},
    {"model"},
    {"checkpoint", "decode_sharding"},
    {"pipeline", "sampling", "tokenizer"},
    {"requests"},
    {"engine"},
    {"answer"},
    {"frontdesk"},
    {"generation"},
    {"doctor"},
    {"evaluation", "kernel_benchmarking", "benchmarking.probe", "benchmarking.hugging_face", "benchmarking.report"},
    {"benchmarking.contenders"},
    {"benchmarking"},
]
"""Rooms of the way, first to last; a package's name stands for its modules that are not named themselves."""


def level(module):
    """Index in ORDER of a dotted module name without `nemo_star.`."""
    for name in (module, module.partition(".")[0]):
        for index, names in enumerate(ORDER):
            if name in names:
                return index
    raise AssertionError(f"nemo_star.{module} has no place in the order of imports: tests/test_imports.py")


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


FILES = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_before_it(file):
    relative = file.relative_to(PACKAGE).with_suffix("")
    module = ".".join(part for part in relative.parts if part != "__init__")
    for imported in imports(file):
        same_package = "." in module and imported.partition(".")[0] == module.partition(".")[0] == "checkpoint"
        assert same_package or level(imported) < level(module), f"{module} imports {imported}"


@pytest.mark.parametrize("module", ["config", "launch", "cli", "partition", "planning.report"])
def test_what_checks_a_command_line_does_not_import_torch(module):
    program = f"import sys, nemo_star.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
