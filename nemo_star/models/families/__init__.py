"""Model families, a file each: a mapping table, and the shape out of a Hugging Face configuration.

A family has `ARCHITECTURE`, `weights(model)`, `is_ignored(name, model)` and `model_config(hf_config)`, after the
pattern of llama.py. A file of this folder is all that a family needs to be found.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType

_SHARED = frozenset({"weights"})
"""The modules of this folder that are no families."""


@functools.cache
def families() -> dict[str, ModuleType]:
    """Hugging Face architecture -> family."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)
    found = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {family.ARCHITECTURE: family for family in found}
