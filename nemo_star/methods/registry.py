"""Method by name: a file of this folder each, or a class of somebody else's."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.method import Method

_INTERFACE = frozenset({"config", "method", "partition", "registry"})
"""The modules of this folder that are no methods."""


@functools.cache
def known_kinds() -> tuple[str, ...]:
    """The methods of this folder, by name."""
    import nemo_star.methods as folder

    return tuple(
        sorted(module.name for module in pkgutil.iter_modules(folder.__path__) if module.name not in _INTERFACE)
    )


@functools.cache
def method_class(kind: str) -> type[Method]:
    """The description of the method called `kind`, or of the class at the import path `package.module.Class`.

    Raises:
        ValueError: no such method.
    """
    path, _, name = kind.rpartition(".")
    if not path and kind in known_kinds():
        module = importlib.import_module(f"nemo_star.methods.{kind}")
        return next(value for value in vars(module).values() if _is_method(value) and value.kind == kind)
    found: Any = None
    if path:
        try:
            found = getattr(importlib.import_module(path), name, None)
        except ImportError as error:
            raise ValueError(f"attention.kind={kind!r} cannot be imported: {error}") from error
    if not _is_method(found):
        raise ValueError(
            f"attention.kind={kind!r} is unknown; known: {', '.join(known_kinds())}, and package.module.Class of a "
            f"{Method.__name__} of your own"
        )
    return found


def method_of(attention: AttentionConfig, *, windows: bool = False) -> Method:
    """The method that `attention` asks for, with its settings.

    Args:
        windows: the model has windowed layers or sinks.

    Raises:
        ValueError: no such method, or one without windows.
    """
    method = method_class(attention.kind)(attention)
    return method.with_windows() if windows else method


def _is_method(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Method) and value is not Method
