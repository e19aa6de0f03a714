"""Keys of `nemo-star fidelity`."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_star.config.evaluate import EvaluateConfig
from nemo_star.methods.registry import method_class


@dataclass(frozen=True)
class FidelityConfig(EvaluateConfig):
    """All keys of `nemo-star fidelity`: those of `nemo-star evaluate`, and how to look."""

    compare: tuple[str, ...] = ("star",)
    """Words METHOD[:VARIANT] of one method that has blocks: each is compared with dense attention, which is the same
    method with one block."""
    block_sizes: tuple[int | str, ...] = ("n/2", "n/4", "n/8", "n/16")
    """Each of these, in tokens or as a part of the length (n/4); none: attention.block_size."""
    samples: int = 40
    """Of each task, or text, at each length: with fewer, intervals are too wide to call anything safe."""
    input: str | None = None
    """JSON lines {"id", "task", "context", "query"} instead of tasks; with "answer" (a text) that is the teacher, else
    what dense attention answers; with "outputs" of one text, its place in the context is looked up."""
    texts: tuple[str, ...] = ()
    """Plain text files instead of tasks, cut into pieces of each length: context, query and answer are the text."""
    query_tokens: int = 32
    """Of a piece of text, after the context."""
    answer_tokens: int = 64
    """Of a piece of text, after the query: those whose distributions are compared."""
    rows: int = 128
    """Positions of each context whose attention mass is measured, one in each of so many equal parts."""
    sink_samples: int = 4
    """Samples of each task at each length in which attention on a block's first tokens is measured, with and without an
    anchor (which takes a further prefill for each block size)."""
    tolerance: float = 10.0
    """Answers of 100 that may change: a block size is `safe` where the 95% interval says that no more do, `not safe`
    where it says that more do, else `at the edge`. For answers that were given, a tenth of it, of tokens."""
    scores: str | None = None
    """Folder that `nemo-star evaluate` wrote for the same samples: fidelity is compared with its scores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat:
            raise ValueError("chat=true is of nemo-star evaluate: here samples are compared without a template")
        if self.input and self.texts:
            raise ValueError("input and texts are both set: give one of them")
        for name in ("query_tokens", "answer_tokens", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.sink_samples < 0:
            raise ValueError(f"sink_samples={self.sink_samples} must be at least 0")
        if not 0 < self.tolerance < 100:
            raise ValueError(f"tolerance={self.tolerance} must be above 0 and below 100")
        if self.texts and self.scores:
            raise ValueError("scores is of tasks, and texts has none: leave one of them out")
        if self.texts and self.query_tokens + self.answer_tokens >= min(self.lengths):
            raise ValueError(
                f"query_tokens={self.query_tokens} and answer_tokens={self.answer_tokens} leave no context of "
                f"lengths={min(self.lengths)}"
            )
        kinds = {contender.candidate.kind for contender in self.contenders()}
        if len(kinds) > 1:
            raise ValueError(f"compare holds several methods ({', '.join(sorted(kinds))}): give one at a time")
        for kind in kinds:
            if method_class(kind).exact or not method_class(kind).has_blocks:
                raise ValueError(f"compare: {kind} gives what dense attention gives; a method with blocks is wanted")
        if any(contender.candidate.decode for contender in self.contenders()):
            raise ValueError("compare: +decode is not for fidelity; give parallel.decode")
