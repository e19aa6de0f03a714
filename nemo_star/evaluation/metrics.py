"""Scores of answers, 0 to 100: `METRICS[name](prediction, outputs, query)`.

Sources: NVIDIA/RULER, scripts/eval/synthetic/constants.py (commit c3f5e3b), whose evaluation strips answers and
replaces control characters first (scripts/eval/evaluate.py); booydar/babilong, babilong/metrics.py (commit 7a6efee);
OpenBMB/InfiniteBench, src/compute_scores.py (commit 88b3daa); `grade` of the card of the data set openai/mrcr. A task's
score is the mean of its samples' there, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import partial
from types import MappingProxyType

Metric = Callable[[str, Sequence[str], str], float]
"""Of a prediction, its references and its query."""

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
GIFTS = ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk")

_CONTROL = re.compile(r"[\x00-\x1f]")
_MARKED_UP = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))
_PREFIX = re.compile(r"Prepend (\S+) to the ")


def string_match_all(prediction: str, outputs: Sequence[str], query: str) -> float:
    """RULER's: the share of references that are found, whatever their case."""
    found = _found(prediction, outputs)
    return 100 * sum(found) / len(found)


def string_match_part(prediction: str, outputs: Sequence[str], query: str) -> float:
    """RULER's: whether any reference is found."""
    return 100.0 * any(_found(prediction, outputs))


def only_label(prediction: str, outputs: Sequence[str], query: str, *, labels: Sequence[str]) -> float:
    """BABILong's: of all labels that the query does not name, the answer's first sentence names the right one alone."""
    said = prediction.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    known = {label.lower() for label in labels}
    named = {label for label in known if label in said and label not in query.lower()}
    return 100.0 * (named == {outputs[0].lower()})


def first_number(prediction: str, outputs: Sequence[str], query: str) -> float:
    """InfiniteBench's for passkey and number_string: the first digits of the answer are the right ones."""
    match = re.search(r"[0-9]+", prediction)
    return 100.0 * (match is not None and match[0] == outputs[0])


def one_word(prediction: str, outputs: Sequence[str], query: str) -> float:
    """InfiniteBench's for kv_retrieval: the value is a word of the answer."""
    return 100.0 * (outputs[0] in prediction.translate(_MARKED_UP).split())


def prefixed_ratio(prediction: str, outputs: Sequence[str], query: str) -> float:
    """openai/mrcr's: how alike answer and reference are (difflib); 0 without the prefix that the query asks for.

    White space before the answer does not count: a prompt without chat template ends in "Assistant:".

    Raises:
        ValueError: the query asks for no prefix.
    """
    asked = _PREFIX.findall(query)
    if not asked:
        raise ValueError("a query of this metric says: Prepend PREFIX to the ...")
    answer = prediction.lstrip()
    if not answer.startswith(asked[-1]):
        return 0.0
    reference = outputs[0].removeprefix(asked[-1])
    return 100 * SequenceMatcher(None, answer.removeprefix(asked[-1]), reference).ratio()


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "all": string_match_all,
        "part": string_match_part,
        "place": partial(only_label, labels=PLACES),
        "gift": partial(only_label, labels=GIFTS),
        "first_number": first_number,
        "one_word": one_word,
        "prefixed_ratio": prefixed_ratio,
    }
)


def _found(prediction: str, outputs: Sequence[str]) -> list[bool]:
    if not outputs:
        raise ValueError("a score takes at least one reference")
    cleaned = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [reference.lower() in cleaned for reference in outputs]
