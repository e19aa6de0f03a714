"""Words of `compare`: what tools/benchmark.py measures and tools/plan.py plans."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nemo_star.config.model import ModelConfig
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.method import Method
from nemo_star.methods.registry import known_kinds, method_class, method_of

OPTIONS = {"decode": ("replicated", "sharded"), "steps": ("graph",), "linears": ("torch",)}
"""What a word may say of decode: how cp ranks divide it; that steps are CUDA graphs; that Transformer Engine's linear
layers are torch's functions."""


@dataclass(frozen=True)
class Candidate:
    """A word of `compare`: METHOD[:VARIANT][+OPTION:VALUE ...], e.g. star:recompute+decode:sharded."""

    word: str
    kind: str
    variant: str | None = None
    decode: str | None = None
    cuda_graph: bool = False
    torch_linears: bool = False

    @classmethod
    def parse(cls, word: str, *, others: tuple[str, ...] = (), options: tuple[str, ...] = ("decode",)) -> Candidate:
        """Raises ValueError for a word that means nothing, with those that do; `others` stand for themselves.

        Args:
            options: those of `OPTIONS` that a word may have.
        """
        if word in others:
            return cls(word, word)
        main, *said = word.split("+")
        kind, colon, variant = main.partition(":")
        chosen = {name: value for name, _, value in (option.partition(":") for option in said)}
        try:
            method = method_class(kind)
        except ValueError as error:
            raise ValueError(f"compare: {word!r} is unknown; known: {_known(others, options)}") from error
        right_variant = not colon or variant in method.variants
        right_options = len(chosen) == len(said) and all(
            option in options and value in OPTIONS[option] and (option != "decode" or method.shares_context)
            for option, value in chosen.items()
        )
        if not (right_variant and right_options):
            raise ValueError(f"compare: {word!r} is unknown; known: {_known(others, options)}")
        return cls(word, kind, variant or None, chosen.get("decode"), "steps" in chosen, "linears" in chosen)

    def method(self, settings: AttentionConfig, model: ModelConfig) -> Method:
        """The method with `settings`, less what the word itself says, for this model."""
        changes = {"kind": self.kind, **({"anchor": self.variant} if self.variant else {})}
        return method_of(dataclasses.replace(settings, **changes), windows=model.needs_windows)  # type: ignore[arg-type]


def _known(others: tuple[str, ...], options: tuple[str, ...]) -> str:
    alone: list[str] = []
    shared: list[str] = []
    for kind in known_kinds():
        method = method_class(kind)
        words = [f"{kind}:{variant}" for variant in method.variants] or [kind]
        (shared if method.shares_context else alone).extend(words)
    rest = ", ".join((*alone, *others))
    further = "".join(f"; on GPUs +{name}:{value}" for name in options if name != "decode" for value in OPTIONS[name])
    return f"{', '.join(shared)}, each with +decode:sharded or +decode:replicated if wanted, and {rest}{further}"
