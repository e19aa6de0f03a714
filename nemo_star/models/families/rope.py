"""The rotary settings of a config.json, as transformers 4 and 5 write them.

transformers 5 keeps all in `rope_parameters`; 4 had `rope_theta`, `rope_scaling` and `partial_rotary_factor`. Where
windowed layers are rotated otherwise than those that see everything (Gemma 3, OLMo 3), 5 has a group for either in
`rope_parameters`; in 4 `rope_scaling` was of the latter, and the former had `rope_local_base_freq` (Gemma 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})

_ORIGINAL = "original_max_position_embeddings"
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
"""Kind -> keys that it cannot do without."""
_FURTHER: dict[str, tuple[str, ...]] = {
    "dynamic": ("factor", "alpha"),
    "llama3": (_ORIGINAL,),
    "yarn": ("factor", _ORIGINAL, "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("factor", _ORIGINAL, "attention_factor"),
}
"""Kind -> further keys that it reads."""
_ALIASES = {"su": "longrope"}
"""Phi-3's first name for it."""
_BESIDE = {
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "max_position_embeddings",
    "llama_4_scaling_beta",
}
"""Keys of the group that are no kind's own; the last is Ministral 3's."""


def read_rope(values: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig that say how queries and keys are rotated; types are checked by who parses them.

    Args:
        rope: the group of keys in `values` that says so.

    Raises:
        ValueError: a kind that is not implemented, or lacks a key, or has one that is not known.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = _ALIASES.get(kind, kind)
    if kind not in _NEEDED:
        raise ValueError(
            f"config.json: rope scaling of type {kind!r} is not supported; supported: {', '.join(_NEEDED)}"
        )
    missing = [name for name in _NEEDED[kind] if rope.get(name) is None]
    if missing:
        raise ValueError(f"config.json: rope scaling of type {kind!r} lacks {', '.join(missing)}")
    known = {*_NEEDED[kind], *_FURTHER.get(kind, ()), *_BESIDE, _ORIGINAL}
    unknown = sorted(name for name, value in rope.items() if name not in known and value is not None)
    if unknown:
        raise ValueError(f"config.json: rope scaling of type {kind!r} with {', '.join(unknown)} is not supported")
    fields: dict[str, Any] = {
        "rotary_base": rope.get("rope_theta") or values.get("rope_theta") or 10000.0,
        "rotary_percent": rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0,
        "rope_scaling": None,
    }
    if kind == "dynamic":
        # The base depends on the length past this one, and with it every key that is cached.
        fields["max_exact_positions"] = values.get("max_position_embeddings", 2048)
    if kind not in ("default", "dynamic"):
        fields["rope_scaling"] = {"rope_type": kind, **_scaling(kind, rope, values)}
    return fields


def group(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys that say how rotary frequencies are stretched."""
    return _checked(values.get("rope_scaling") or values.get("rope_parameters") or {})


def full_group(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same of the layers that see everything, where windowed ones have a group of their own."""
    return {**_by_layer(values, "full_attention"), **_checked(values.get("rope_scaling") or {})}


def windowed_rotary_base(values: Mapping[str, Any], default: float) -> float | None:
    """Base of the windowed layers that have a group of their own: default frequencies only. None: all layers are alike.

    Args:
        default: where config.json has none.

    Raises:
        ValueError: they are stretched.
    """
    rope = _by_layer(values, "sliding_attention")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    further = sorted({name for name, value in rope.items() if value is not None} - {"rope_type", "type", "rope_theta"})
    if kind != "default" or further:
        words = f"of type {kind!r}" + (f" with {', '.join(further)}" if further else "")
        raise ValueError(
            f"config.json: rope scaling {words} is not supported for windowed layers (sliding_attention), only for "
            "those that see everything (full_attention)"
        )
    base: float = rope.get("rope_theta") or default
    others = read_rope(values, full_group(values))
    return None if others["rope_scaling"] is None and others["rotary_base"] == base else base


def _by_layer(values: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """What `rope_parameters` says of one kind of layers."""
    groups = _checked(values.get("rope_parameters") or {})
    if unknown := sorted(set(groups) - {"full_attention", "sliding_attention"}):
        raise ValueError(
            f"config.json: rope_parameters with {', '.join(unknown)} is not supported for this architecture, which has "
            "a group for full_attention and one for sliding_attention there"
        )
    return _checked(groups.get(kind) or {})


def _checked(rope: Any) -> Mapping[str, Any]:
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: the rope scaling {rope!r} must be a group of keys")
    return rope


def _scaling(kind: str, rope: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of RopeScaling; a length or factor that is left out follows from others as in transformers."""
    if kind == "linear":
        return {"factor": rope["factor"]}
    longest = values.get("max_position_embeddings", 2048)
    original = values.get(_ORIGINAL) or rope.get(_ORIGINAL) or longest
    scaling: dict[str, Any] = {_ORIGINAL: original}
    if kind == "llama3":
        return {**scaling, **{name: rope[name] for name in _NEEDED[kind]}}
    factor = rope.get("factor") or longest / original
    given = rope.get("attention_factor")
    if kind == "yarn":
        scaling["factor"] = factor
        scaling |= {name: rope[name] for name in ("beta_fast", "beta_slow", "truncate") if rope.get(name) is not None}
        scaling["attention_factor"] = _yarn_attention_factor(factor, rope) if given is None else given
        return scaling
    scaling |= {name: rope[name] for name in _NEEDED[kind]}
    stretched = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {**scaling, "factor": factor, "attention_factor": stretched if given is None else given}


def _yarn_attention_factor(factor: float, rope: Mapping[str, Any]) -> float:
    """arXiv 2309.00071, section 3.4; DeepSeek's and Mistral's mscale."""

    def of(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    return of(mscale) / of(all_dim) if mscale and all_dim else of(1.0)
