"""Plain values -> strict dataclasses: an unknown or ill-typed key is refused by its name."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")


def parse(cls: type[Config], values: Mapping[str, Any], *, prefix: str = "") -> Config:
    """Build the dataclass `cls` from nested plain values.

    Raises:
        ValueError: a key that `cls` does not have, or a value of the wrong type; the message names the full key.
    """
    hints = typing.get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    unknown = [f"{prefix}{key}" for key in values if key not in known]
    if unknown:
        raise ValueError(
            f"unknown key {', '.join(unknown)}; known keys here: {', '.join(prefix + key for key in known)}"
        )
    built = {}
    for name, item in known.items():
        if name in values:
            built[name] = _convert(hints[name], values[name], f"{prefix}{name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"missing key {prefix}{name}")
    return cls(**built)


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`, or a ValueError that names the key, the value and what would be right."""
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{key}={value!r} must be a group of keys")
        return parse(hint, value, prefix=f"{key}.")
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
        return _convert(hint, value, key)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{key}={value!r} must be one of: {', '.join(typing.get_args(hint))}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ValueError(f"{key}={value!r} must be a list")
        return tuple(_convert(typing.get_args(hint)[0], item, key) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{key}={value!r} must be a mapping")
        return {name: _convert(typing.get_args(hint)[1], item, f"{key}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{key}={value!r} must be of type {hint.__name__}")
    return value
