"""Plain values -> strict dataclasses, by pydantic: an unknown or ill-typed key is refused by its name."""

from __future__ import annotations

import functools
import json
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

Config = TypeVar("Config")

_EXPECTED = {
    "int_type": "of type int",
    "float_type": "of type float",
    "string_type": "of type str",
    "bool_type": "of type bool",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a group of keys",
}
"""pydantic's names of the mistakes that a recipe can hold -> what would be right, in a recipe's words."""


def parse(cls: type[Config], values: Mapping[str, Any], *, prefix: str = "") -> Config:
    """Build the dataclass `cls` from nested plain values, as a recipe or a JSON file holds them.

    Raises:
        ValueError: keys that `cls` does not have or that are missing, values of the wrong type, all of them on one
            line with their full keys; or what the `__post_init__` of a dataclass raises, as it is.
    """
    not_text = [f"{prefix}{name}" for name, value in values.items() if not _is_utf8(value)]
    if not_text:
        raise ValueError(f"{', '.join(not_text)}: must be UTF-8 text")
    try:
        # In pydantic's strict mode, JSON is what a recipe is: lists become tuples and groups dataclasses, an int will
        # do for a float, and nothing else is converted. Python values would have to be tuples and dataclasses already.
        adapter: TypeAdapter[Config] = _adapter(cls)  # type: ignore[arg-type]  # a class is hashable
        return adapter.validate_json(json.dumps(values, default=str), strict=True, extra="forbid")
    except ValidationError as error:
        problems = [text for problem in error.errors(include_url=False) for text in _describe(cls, problem, prefix)]
    raise ValueError("; ".join(dict.fromkeys(problems)))


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _is_utf8(value: Any) -> bool:
    """Whether JSON can hold it: the shell's bytes that are not UTF-8 reach Python as lone surrogates."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe(cls: type, problem: ErrorDetails, prefix: str) -> list[str]:
    """One of pydantic's problems with `cls`, in the project's words; what two of them share is worded alike."""
    path, what, value = problem["loc"], problem["type"], problem["input"]
    key = prefix + ".".join(map(str, path))
    if what == "value_error":
        return [str(problem["ctx"]["error"])]
    if what == "missing":
        return [f"missing key {key}"]
    if what == "unexpected_keyword_argument":
        group = prefix + "".join(f"{name}." for name in path[:-1])
        known = ", ".join(group + item.name for item in fields(_dataclass_at(cls, path[:-1])))
        return [f"unknown key {key}", f"known keys here: {known}"]
    if what == "literal_error":
        return [f"{key}={value!r} must be {problem['ctx']['expected']}"]
    if what in _EXPECTED:
        return [f"{key}={value!r} must be {_EXPECTED[what]}"]
    return [f"{key}={value!r}: {problem['msg']}"]


def _dataclass_at(cls: Any, path: tuple[int | str, ...]) -> Any:
    """The dataclass that keys, and places in a list, lead to from `cls`."""
    for name in (name for name in path if isinstance(name, str)):
        hint = typing.get_type_hints(cls)[name]
        (cls,) = (option for option in (hint, *typing.get_args(hint)) if is_dataclass(option))  # in Group | None, too
    return cls
