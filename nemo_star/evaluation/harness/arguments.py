"""What lm-evaluation-harness gives as arguments, of a model and of generation, in this engine's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from nemo_star.config.llm import LLMConfig
from nemo_star.config.sampling import DEFAULT_SEED, SamplingParams
from nemo_star.config.strict import parse

_KNOWN = frozenset(("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "seed"))
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}
"""Of others, what changes nothing."""


def sampling(arguments: Mapping[str, Any], number: int, *, default_tokens: int) -> SamplingParams:
    """How the request in this place of a list is answered.

    Args:
        arguments: `generation_kwargs`; without do_sample=true, or a temperature above 0, the likeliest token is taken.
        number: repeats of a request are drawn with seeds of their own.
        default_tokens: where they do not say how many.

    Raises:
        ValueError: arguments that this engine does not have, by name.
    """
    given = dict(normalize_gen_kwargs(dict(arguments), default_tokens))
    unknown = [name for name in given if name not in _KNOWN and given[name] != _NEUTRAL.get(name)]
    if unknown:
        raise ValueError(
            f"generation_kwargs: {', '.join(f'{name}={given[name]!r}' for name in unknown)} is not implemented; known: "
            f"{', '.join(sorted(_KNOWN))}"
        )
    top_p, seed = given.get("top_p"), given.get("seed")
    return SamplingParams(
        max_tokens=given["max_gen_toks"],
        temperature=float(given.get("temperature", 1.0)) if given["do_sample"] else 0.0,
        top_k=max(0, given.get("top_k") or 0),
        top_p=1.0 if top_p is None else float(top_p),
        seed=(DEFAULT_SEED if seed is None else seed) + number,
        stop=tuple(text for text in given["until"] if text),
    )


def llm_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `LLM`, of `model_args` with a recipe's keys.

    Raises:
        ValueError: unknown keys, values that they do not take.
    """
    return asdict(parse(LLMConfig, _nested(values)))


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`a.b=c` as groups; a word for the group of attention is its kind, as in a recipe."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key == "attention" and isinstance(value, str):
            key = "attention.kind"
        *groups, name = key.split(".")
        inner = found
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return found
