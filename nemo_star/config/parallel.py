"""Sizes of the process groups: the `parallel` group of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_MINUTES = 60 * 24 * 365


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the process groups; data parallel is what remains of the world size."""

    tensor_model_parallel_size: int = 1
    """Ranks (tp) that share every layer: its heads and its FFN."""
    pipeline_model_parallel_size: int = 1
    """Stages (pp) that share the layers, one after the other."""
    context_parallel_size: int | None = None
    """Ranks (cp) that share the context; None: all ranks that tp and pp leave over (for dense attention: 1)."""
    expert_model_parallel_size: int = 1
    """Ranks (ep) of those of tp and cp that divide the experts of a mixture, over cp first; the tp ranks that are left
    divide each expert. 1: every cp rank has all experts."""
    decode: Literal["replicated", "sharded"] | None = None
    """How cp ranks divide decode: attention always; `sharded` also the FFN and the head, which `replicated` runs
    on each. None: `sharded` where an estimate says that it pays."""
    merge: Literal["auto", "triton", "torch"] = "auto"
    """What merges the partial results of attention in decode, over what ranks and caches hold: one kernel of the
    project's own (`triton`), or `torch`'s operations. `auto`: Triton on GPUs where it runs, torch elsewhere."""
    sequence_parallel: bool = False
    """Prefill on GPUs with tensor parallelism: hidden states are divided over the tp ranks between matrix products."""
    context_parallel_max_ctas: int | None = None
    """On GPUs: thread blocks that NCCL's kernels over cp take at most. Those of anchors' broadcasts wait on their SMs
    beside the matrix products of the whole prefill; 4 are few. None: as many as NCCL wants. Not measured."""
    timeout_minutes: float = 30.0
    """The job ends when no rank has finished a layer or a request for so long; work that goes on has no limit."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "context_parallel_max_ctas",
        ):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"parallel.{name}={size} must be at least 1")
        if not 0 < self.timeout_minutes <= MAX_MINUTES:
            raise ValueError(f"parallel.timeout_minutes={self.timeout_minutes} must be above 0, at most {MAX_MINUTES}")
