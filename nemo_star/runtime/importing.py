"""Large packages imported in less time.

Python's garbage collector goes through everything again and again while thousands of modules are made, and finds
nothing: a sixth of the time of an import.

Megatron decorates functions of training and of mixture of experts with torch.compile, by its `jit_fuser` or directly.
None of them runs in inference here, but decorating alone imports torch's compiler, a second of every start. Megatron
and torch have switches for it, `megatron.core.jit.disable_jit_fuser()` and `torch.compiler.set_default_backend`, which
count for what is decorated afterwards. `import megatron.core` itself decorates, so the import system throws them, when
it comes to the modules concerned; whatever else this process compiles is compiled as always.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_Execute = Callable[[ModuleType], None]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For imports of large packages; what they made is left alone by later collections, too."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def leave_megatron_uncompiled() -> None:
    """To be called before Megatron is imported; later it changes nothing. Calling it again changes nothing."""
    if "megatron.core" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _with_jit_fuser_off(execute: _Execute, module: ModuleType) -> None:
    execute(module)
    getattr(module, "disable_jit_fuser", lambda: None)()  # a release without it compiles, and works


def _with_no_backend(execute: _Execute, module: ModuleType) -> None:
    """Megatron 0.19 decorates here without a backend, and torch's own, inductor, is the larger half of the compiler."""
    import torch

    decorates = "@torch.compile" in Path(str(module.__file__)).read_text(encoding="utf-8")
    if not decorates or not hasattr(torch.compiler, "set_default_backend"):  # Megatron 0.16, torch before 2.13
        execute(module)
        return
    backend = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend("eager")
    try:
        execute(module)
    finally:
        torch.compiler.set_default_backend(backend)


_SWITCHES: dict[str, Callable[[_Execute, ModuleType], None]] = {
    "megatron.core.jit": _with_jit_fuser_off,
    "megatron.core.transformer.moe.router": _with_no_backend,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds these modules as the import system does by itself, and gives them a loader that throws the switch."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _SWITCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _SWITCHES[fullname])
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, switch: Callable[[_Execute, ModuleType], None]) -> None:
        self._loader = loader
        self._switch = switch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._switch(self._loader.exec_module, module)
