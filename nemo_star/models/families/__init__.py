"""Model families, a file each with a `FAMILY`: a Hugging Face configuration read into the model's shape, and a mapping
table. A file of this folder is all that a family needs to be found.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from nemo_star.models.families.family import Family

_SHARED = frozenset({"decoder", "experts", "family", "layers", "rope", "weights"})
"""The modules of this folder that are no families."""


@functools.cache
def families() -> dict[str, Family]:
    """Hugging Face architecture -> family."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)
    found = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {family.architecture: family for family in found}
