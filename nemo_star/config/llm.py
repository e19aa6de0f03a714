"""What a model runs with: checkpoint, type, attention, layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_star.config.parallel import ParallelConfig
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.registry import method_class

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CacheConfig:
    """Cached keys and values."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of cached keys and values; None: the model's."""


@dataclass(frozen=True)
class LLMConfig:
    """What `LLM` takes, and the keys that every tool with a checkpoint has."""

    checkpoint: str | None = None
    """Directory made by `nemo-star convert import`."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type the model computes in; None: float32 on CPU, bfloat16 on GPU."""
    chat_template: bool = False
    """Wrap context and query in the tokenizer's chat template as one user message (instruct models)."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError("checkpoint is not set: give checkpoint=DIR, a directory made by nemo-star convert import")
        method_class(self.attention.kind)
