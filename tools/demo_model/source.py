"""What sequences are made from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from demo_model.words import Words

SKIPS = 3


@dataclass(frozen=True)
class Source:
    words: Words
    rng: random.Random
    length: int
    """Tokens of a sequence."""
    skip_to: int
    """Positions skip up to this one; 0: none."""

    def key(self) -> str:
        return f"{self.rng.choice(self.words.adjectives)}-{self.rng.choice(self.words.nouns)}"

    def value(self) -> str:
        return str(self.rng.randint(10**6, 10**7 - 1))

    def skips(self, parts: int) -> list[int]:
        """How many positions to skip before each part: in all up to `skip_to`, at three random places (PoSE)."""
        skips = [0] * parts
        if self.skip_to > self.length and parts:
            total = self.rng.randint(0, self.skip_to - self.length)
            ends = sorted(self.rng.randint(0, total) for _ in range(SKIPS))
            for start, end in pairwise([0, *ends]):
                skips[self.rng.randrange(parts)] += end - start
        return skips
