"""Keys of a configuration class as text for `--help`: types, defaults, and the docstrings under the fields."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

WIDTH = 110
_DEFAULTS_COLUMN = 58
_TYPES = {"integer": "int", "number": "float", "string": "text", "boolean": "true|false", "object": "{name: value,...}"}
"""JSON schema's names of types -> what a user gives; others as they are."""


def describe_keys(cls: type, *, groups: Path) -> str:
    """Each key of the dataclass `cls` and of those inside it, one after the other.

    Args:
        groups: folder of Hydra's groups (conf/); a field with the name of a folder there can be chosen as a whole.
    """
    classes = _schemas(cls)
    for base in filter(is_dataclass, cls.__mro__[1:]):  # pydantic reads the docstrings of the class's own fields only
        inherited = _schemas(base)[base.__name__]["properties"]
        for name, field in classes[cls.__name__]["properties"].items():
            if described := inherited.get(name, {}).get("description"):
                field.setdefault("description", described)
    return "\n".join(_describe_class(classes[cls.__name__], classes, "", groups))


def _schemas(cls: type) -> dict[str, Any]:
    """JSON schemas of `cls` and of the classes inside it, by name."""
    # A dataclass has no place for pydantic's configuration; the tuple around it takes it and hands it on.
    adapter = TypeAdapter(tuple[cls], config=ConfigDict(use_attribute_docstrings=True))  # type: ignore[valid-type]
    found: dict[str, Any] = adapter.json_schema()["$defs"]
    return found


def _describe_class(schema: dict[str, Any], classes: dict[str, Any], prefix: str, groups: Path) -> Iterator[str]:
    for name, field in schema["properties"].items():
        options = field.get("anyOf", [field])
        inner = [classes[option["$ref"].rpartition("/")[2]] for option in options if "$ref" in option]
        if not inner:
            default = f"default: {_value(field['default'])}" if "default" in field else "required"
            yield f"{prefix}{name}={'|'.join(map(_type, options))}".ljust(_DEFAULTS_COLUMN) + f" {default}"
            yield from _indented(field.get("description", ""))
            continue
        choices = sorted(file.stem for file in (groups / name).glob("*.yaml")) if not prefix else []
        yield f"{prefix}{name}={'|'.join(choices)}" if choices else f"{prefix}{name}.*"
        yield from _indented(field.get("description") or inner[0].get("description", ""))
        yield from _describe_class(inner[0], classes, f"{prefix}{name}.", groups)


def _type(schema: dict[str, Any]) -> str:
    """What a value of this type looks like on a command line."""
    if "enum" in schema:
        return "|".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return "|".join(map(_type, schema["anyOf"]))
    if schema["type"] == "array":
        return f"[{_type(schema['items'])},...]"
    return _TYPES.get(schema["type"], schema["type"])


def _value(value: Any) -> str:
    """A default as one would give it."""
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _indented(docstring: str) -> list[str]:
    """A docstring as lines below its key, in the words of a command line."""
    text = re.sub(r"\bNone\b", "null", docstring)
    return textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
