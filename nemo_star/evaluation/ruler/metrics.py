"""Scores of answers.

Source: NVIDIA/RULER, scripts/eval/synthetic/constants.py (commit c3f5e3b); the official evaluation strips answers
and replaces control characters first (scripts/eval/evaluate.py), which is done here, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Per cent: the share of references found in a prediction, whatever their case, on average."""
    return _mean([sum(found) / len(found) for found in _found(predictions, references)])


def string_match_part(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Per cent: predictions in which any reference is found."""
    return _mean([float(any(found)) for found in _found(predictions, references)])


def _found(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[bool]]:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} samples")
    if not predictions or not all(references):
        raise ValueError("a score takes at least one prediction and a reference for each")
    cleaned = [_CONTROL.sub("\n", prediction.strip()).strip().lower() for prediction in predictions]
    return [
        [reference.lower() in prediction for reference in wanted]
        for prediction, wanted in zip(cleaned, references, strict=True)
    ]


def _mean(shares: list[float]) -> float:
    return round(sum(shares) / len(shares) * 100, 2)
