"""What Megatron finds when it looks for Transformer Engine and Apex, settled before Megatron is imported.

Megatron imports both where they are installed and does without them on ImportError, but not on anything else: a
Transformer Engine without its core library or torch extension raises OSError at import, and any importable package
called `apex` makes Megatron norm with NVIDIA Apex's FusedLayerNorm, which knows no RMSNorm; PyPI's `apex` is not even
NVIDIA's. So what cannot be used is hidden from this process: an entry None in `sys.modules` makes an import of that
name raise ImportError, a documented rule of the import system. Megatron runs unchanged, as if the package were not
installed, and nothing on disk is touched.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemo_star.runtime.importing import leave_megatron_uncompiled
from nemo_star.runtime.launch import warn

OLDEST_TRANSFORMER_ENGINE = (2, 9)
REPAIR = (
    "To repair it: pip install --no-build-isolation 'transformer-engine[pytorch]'; to be rid of it: pip uninstall "
    "transformer-engine transformer-engine-torch transformer-engine-cu12 transformer-engine-cu13"
)
_NVIDIA_APEX_PARTS = ("multi_tensor_apply", "normalization", "optimizers")


@dataclass(frozen=True)
class TransformerEngine:
    """What a look for Transformer Engine found."""

    state: Literal["absent", "working", "broken", "hidden"]
    """`hidden`: installed or not, this process does not import it (`prepare_imports`)."""
    version: str | None = None
    reason: str | None = None
    """Why it is broken or hidden."""

    def told(self) -> str:
        """For a person, without a full stop."""
        if self.state == "absent":
            return "Transformer Engine is not installed"
        release = f"Transformer Engine {self.version}" if self.version else "Transformer Engine"
        if self.state == "working":
            return f"{release} works"
        return f"{release} is installed but not used: {self.reason}"


def prepare_imports(tell: Callable[[str], None] = warn) -> None:
    """Hide from Megatron what it would stumble over, and say so (on rank 0); to be called before Megatron is imported.

    Calling it again changes nothing.
    """
    if not _is_hidden("apex"):
        problem = unrelated_apex()
        if problem:
            tell(f"{problem}; it is hidden from Megatron in this process")
        _hide(["apex"])  # NVIDIA's, too: of no use here, and its norm has no RMSNorm
    found = find_transformer_engine()
    if found.state == "broken":
        tell(f"{found.told()}; going on without it, with Megatron's own layers. {REPAIR}")
    if found.state == "broken" or (found.state == "working" and not _has_its_device()):
        _hide(["transformer_engine", "transformer_engine_torch"])
    leave_megatron_uncompiled()


def is_loaded() -> bool:
    """Whether this process, and so Megatron in it, has imported a working Transformer Engine."""
    return sys.modules.get("transformer_engine.pytorch") is not None


def find_transformer_engine() -> TransformerEngine:
    """Look for Transformer Engine by importing what Megatron and our kernel import of it."""
    version = installed_version("transformer-engine")
    if _is_hidden("transformer_engine"):
        if version is None:
            return TransformerEngine("absent")
        why = "its import failed" if _has_its_device() else "there is no GPU that it runs on (Ampere or later)"
        return TransformerEngine("hidden", version, why)
    if importlib.util.find_spec("transformer_engine") is None:
        return TransformerEngine("absent")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # First: its core library needs libnccl.so.2 and does not look for it (2.20, common/__init__.py), so that
            # beside packages of CUDA from PyPI it loads only where torch has brought NCCL into the process.
            importlib.import_module("torch")
            package = importlib.import_module("transformer_engine")
            importlib.import_module("transformer_engine.pytorch")
            importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
    except Exception as error:  # OSError, ImportError, AssertionError, RuntimeError: whatever a half of it meets
        told = (str(error).strip() or "no message").splitlines()[0]
        return TransformerEngine("broken", version, f"its import fails with {type(error).__name__}: {told}")
    version = str(getattr(package, "__version__", version))
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TRANSFORMER_ENGINE:
        oldest = ".".join(map(str, OLDEST_TRANSFORMER_ENGINE))
        return TransformerEngine("broken", version, f"nemo_star needs {oldest} or later")
    return TransformerEngine("working", version)


def unrelated_apex() -> str | None:
    """What is wrong with an installed `apex` that is not NVIDIA's; None where there is none, or it is NVIDIA's."""
    spec = None if _is_hidden("apex") else importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    if any((folder / part).exists() for folder in folders for part in _NVIDIA_APEX_PARTS):
        return None
    return (
        f"the installed package apex {installed_version('apex') or ''}".rstrip()
        + " is not NVIDIA Apex but PyPI's unrelated one, and Megatron would take it for NVIDIA's: pip uninstall apex "
        "(nothing is needed in its place)"
    )


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution by its metadata, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_its_device() -> bool:
    """Whether this process's GPU is of a generation that Transformer Engine runs on."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _is_hidden(name: str) -> bool:
    return name in sys.modules and sys.modules[name] is None


def _hide(names: Iterable[str]) -> None:
    """Make imports of these packages raise ImportError, parts that an attempt left behind included."""
    for name in names:
        for loaded in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[loaded]
        sys.modules[name] = None  # type: ignore[assignment]
