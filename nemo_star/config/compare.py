"""Words of `compare`: what tools/benchmark.py measures and tools/plan.py plans."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nemo_star.config.model import ModelConfig
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.method import Method
from nemo_star.methods.registry import known_kinds, method_class, method_of

DECODE_MODES = ("replicated", "sharded")


@dataclass(frozen=True)
class Candidate:
    """A word of `compare`: METHOD[:VARIANT][+decode:MODE], e.g. star:recompute+decode:sharded."""

    word: str
    kind: str
    variant: str | None = None
    decode: str | None = None

    @classmethod
    def parse(cls, word: str, *, others: tuple[str, ...] = ()) -> Candidate:
        """Raises ValueError for a word that means nothing, with those that do; `others` stand for themselves."""
        if word in others:
            return cls(word, word)
        main, plus, mode = word.partition("+")
        kind, colon, variant = main.partition(":")
        option, _, decode = mode.partition(":")
        try:
            method = method_class(kind)
        except ValueError as error:
            raise ValueError(f"compare: {word!r} is unknown; known: {_known(others)}") from error
        right_variant = not colon or variant in method.variants
        right_decode = not plus or (option == "decode" and decode in DECODE_MODES and method.shares_context)
        if not (right_variant and right_decode):
            raise ValueError(f"compare: {word!r} is unknown; known: {_known(others)}")
        return cls(word, kind, variant or None, decode or None)

    def method(self, settings: AttentionConfig, model: ModelConfig) -> Method:
        """The method with `settings`, less what the word itself says, for this model."""
        changes = {"kind": self.kind, **({"anchor": self.variant} if self.variant else {})}
        return method_of(dataclasses.replace(settings, **changes), windows=model.needs_windows)  # type: ignore[arg-type]


def _known(others: tuple[str, ...]) -> str:
    alone: list[str] = []
    shared: list[str] = []
    for kind in known_kinds():
        method = method_class(kind)
        words = [f"{kind}:{variant}" for variant in method.variants] or [kind]
        (shared if method.shares_context else alone).extend(words)
    rest = ", ".join((*alone, *others))
    return f"{', '.join(shared)}, each with +decode:sharded or +decode:replicated if wanted, and {rest}"
