"""Words of RULER's keys and lists, split into those to train on and those kept for measuring."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from nemo_star.evaluation.ruler.sources import Kind, word_list

KEPT_OF = 5
"""One word in five is kept."""


@dataclass(frozen=True)
class Words:
    """Words of the package wonderwords, in its order."""

    adjectives: list[str]
    nouns: list[str]
    verbs: list[str]


def words(*, kept: bool) -> Words:
    """Those that training never sees, or the others. Which ones depends on the word alone."""

    def part(kind: Kind) -> list[str]:
        return [word for word in word_list(kind) if (zlib.crc32(word.encode()) % KEPT_OF == 0) == kept]

    return Words(part("adjective"), part("noun"), part("verb"))
