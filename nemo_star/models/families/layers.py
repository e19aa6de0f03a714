"""Which layers of a config.json are windowed, as transformers 4 and 5 and vLLM write and read them.

`layer_types` names the kind of each layer; a config.json without it means the pattern of its family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

WINDOW_KEYS = frozenset({"sliding_window", "layer_types"})
_FULL, _WINDOWED = "full_attention", "sliding_attention"


def every_layer(layer: int) -> bool:
    return True


def read_windows(
    values: Mapping[str, Any], pattern: Callable[[int], bool] = every_layer, *, rotary_base: float | None = None
) -> dict[str, Any]:
    """Fields of ModelConfig that say which layers are windowed.

    A window as long as the model's positions hides nothing: such layers see everything.

    Args:
        pattern: the family's own, of layers counted from 0.
        rotary_base: of windowed layers, where they are rotated otherwise than the others.

    Raises:
        ValueError: kinds of layers that are not implemented, or windowed ones without a window.
    """
    layers, window = range(values["num_hidden_layers"]), values.get("sliding_window")
    if "layer_types" in values:
        windowed = [layer for layer, kind in enumerate(_kinds(values)) if kind == _WINDOWED]
        if windowed and window is None:
            raise ValueError(f"config.json: layer_types has {_WINDOWED}, but no layer has a sliding_window")
    else:
        windowed = [layer for layer in layers if pattern(layer)] if window is not None else []
    if not windowed:
        return {}
    if not isinstance(window, int) or isinstance(window, bool):
        raise ValueError(f"config.json: sliding_window={window!r} must be of type int")
    longest = values.get("max_position_embeddings")
    if isinstance(longest, int) and window >= longest and rotary_base is None:
        return {}
    return {"window_size": window, "windowed_layers": windowed, "windowed_rotary_base": rotary_base}


def _kinds(values: Mapping[str, Any]) -> Sequence[str]:
    kinds: Sequence[str] = values["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != values["num_hidden_layers"]:
        count = len(kinds) if isinstance(kinds, list) else "no list"
        raise ValueError(f"config.json: layer_types ({count}) must name a kind for each of num_hidden_layers layers")
    if unknown := sorted({str(kind) for kind in kinds} - {_FULL, _WINDOWED}):
        raise ValueError(
            f"config.json: layer_types has {', '.join(unknown)}: not supported, only {_FULL} and {_WINDOWED}"
        )
    return kinds
