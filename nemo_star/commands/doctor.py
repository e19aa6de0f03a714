"""Say what is installed, what works, and which attention kernel would run.

    %(prog)s

Exit code 0 where the project runs (also where something optional is missing or broken), 1 where it cannot.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import sys
import tomllib
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from nemo_star.commands.arguments import parser
from nemo_star.runtime.importing import no_garbage_collection
from nemo_star.runtime.launch import EXIT_ERROR
from nemo_star.runtime.locations import checkout
from nemo_star.runtime.transformer_engine import (
    REPAIR,
    TransformerEngine,
    find_transformer_engine,
    installed_version,
    prepare_imports,
    unrelated_apex,
)


@dataclass(frozen=True)
class Finding:
    about: str
    text: str
    severity: Literal["fine", "wrong", "fatal"] = "fine"
    """`wrong`: the project runs without it; `fatal`: it cannot run."""

    def __str__(self) -> str:
        mark = {"fine": "", "wrong": "problem (runs without it): ", "fatal": "PROBLEM: "}[self.severity]
        return f"{self.about:<20} {mark}{self.text}"


def main(arguments: Sequence[str]) -> int:
    """Print all findings; exit code 1 where one is fatal."""
    parser("doctor", __doc__).parse_args(arguments)
    with warnings.catch_warnings(), no_garbage_collection():
        warnings.simplefilter("ignore")  # of Megatron's imports, about what is reported here
        findings = examine()
    print(*findings, sep="\n")
    return EXIT_ERROR if any(finding.severity == "fatal" for finding in findings) else 0


def examine() -> list[Finding]:
    """All findings, in the order to be shown. Imports torch, Transformer Engine and Megatron."""
    findings = [Finding("Python", f"{platform.python_version()} at {sys.prefix}")]
    findings += [finding for requirement in requirements() if (finding := _requirement(requirement))]
    if installed_version("torch") is None:
        return findings
    findings += [_guarded("torch", _torch), _guarded("CUDA", _cuda), _guarded("NCCL", _nccl)]
    findings += [_apex(), _transformer_engine(find_transformer_engine())]
    prepare_imports(tell=lambda message: None)  # as the tools do; what it would say has been said
    findings += [_guarded("Megatron-core", _megatron), _guarded("will run", _choice)]
    return findings


def requirements() -> list[str]:
    """The project's dependencies without extras: as pyproject.toml lists them, in a checkout or when it was built."""
    folder = checkout()
    if folder is not None:
        return tomllib.loads((folder / "pyproject.toml").read_text())["project"]["dependencies"]
    return [line for line in importlib.metadata.requires("nemo-star") or [] if "extra ==" not in line]


def _requirement(requirement: str) -> Finding | None:
    """What is wrong with a required package; None where its version is in the supported range."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    repair = "make install" if checkout() else f"pip install '{requirement}'"
    version = installed_version(name)
    if version is None:  # which may be all that can be said: packaging comes with the dependencies
        return Finding(name, f"not installed, and {requirement} is needed: {repair}", "fatal")
    from packaging.requirements import Requirement

    if not Requirement(requirement).specifier.contains(version, prereleases=True):
        return Finding(name, f"{version} is installed, and {requirement} is needed: {repair}", "fatal")
    return None


def _guarded(about: str, look: Callable[[], Finding]) -> Finding:
    """A look that may meet anything a half-installed package can raise."""
    try:
        return look()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Finding(about, f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})", "fatal")


def _torch() -> Finding:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU"
    return Finding("torch", f"{torch.__version__}, {build}")


def _cuda() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("CUDA", "no device: runs on CPU with gloo")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("CUDA", f"{len(names)} device(s): {', '.join(sorted(set(names)))}")


def _nccl() -> Finding:
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        return Finding("NCCL", "not needed without CUDA")
    if not dist.is_nccl_available():
        return Finding("NCCL", "this torch has none, and CUDA ranks exchange by it: another build of torch", "fatal")
    return Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def _apex() -> Finding:
    problem = unrelated_apex()
    if problem:
        return Finding("Apex", problem, "wrong")
    version = installed_version("apex")
    return Finding(
        "Apex", f"NVIDIA Apex {version}, not used" if version else "NVIDIA Apex is not installed; not needed"
    )


def _transformer_engine(found: TransformerEngine) -> Finding:
    if found.state == "broken":
        return Finding("Transformer Engine", f"{found.told()}. {REPAIR}", "wrong")
    return Finding("Transformer Engine", found.told().removeprefix("Transformer Engine "))


def _megatron() -> Finding:
    importlib.import_module("megatron.core.models.gpt")
    return Finding("Megatron-core", str(installed_version("megatron-core")))


def _choice() -> Finding:
    import torch

    from nemo_star.kernels.registry import get_kernel, kernels_that_run
    from nemo_star.kernels.settle import USUAL_HEADS, names, settle
    from nemo_star.kernels.stored import stored_type, told
    from nemo_star.models.layer_spec import implementation_for

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    first, *others = kernels_that_run(device, dtype)
    layers = {"local": "Megatron's own", "transformer_engine": "Transformer Engine's"}[
        implementation_for(device, dtype)
    ]
    kernel = get_kernel(first, device, dtype)
    decode, _ = settle(kernel, USUAL_HEADS, device, dtype, decode=True)
    fp8 = stored_type("fp8_e4m3")
    reads_fp8, _ = settle(kernel, USUAL_HEADS, device, dtype, decode=True, stored=fp8)
    text = f"on {device.type} in {str(dtype).removeprefix('torch.')}: attention kernel {names(kernel, decode)}"
    text += f" (also: {', '.join(others)})"
    if device.type == "cpu" and first != "numba":
        text += " (pip install 'nemo-star[cpu]': faster decode over long contexts)"
    return Finding("will run", f"{text}, {layers} layers; cache.dtype={told(reads_fp8, fp8)}")
