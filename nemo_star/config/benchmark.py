"""Keys of `nemo-star benchmark`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_star.config.compare import OPTIONS, Candidate
from nemo_star.config.llm import CacheConfig
from nemo_star.config.model import ModelConfig
from nemo_star.config.parallel import ParallelConfig
from nemo_star.methods.config import AttentionConfig

TRANSFORMERS = "transformers"
"""Hugging Face's own generation on the same weights."""
_LLAMA_HAS = (
    "rope_scaling",
    "add_qkv_bias",
    "add_projection_bias",
    "add_mlp_bias",
    "qk_norm",
    "norms",
    "zero_centered_norms",
    "activation",
    "softmax_scale",
    "rotary_percent",
    "rotary_interleaved",
    "query_scaling",
    "embedding_scale",
    "window_size",
    "attention_sinks",
    "moe",
)
"""Settings of a model's shape that must be as in Llama where transformers is compared with."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """All keys of `nemo-star benchmark`."""

    model: ModelConfig
    compare: tuple[str, ...]
    """What runs in turn: METHOD[:VARIANT][+decode:replicated|sharded], e.g. star:shared, ring; dense and transformers
    (Hugging Face's generate) run on rank 0 with all cores. On GPUs also +steps:graph (decode.cuda_graph) and
    +linears:torch (decode.torch_linears), e.g. star:shared+steps:graph+linears:torch."""
    output: str | None = None
    """JSON file of rows: medians, FLOPs, memory, commit, machine."""
    context_tokens: tuple[int, ...] = (4096, 16384)
    """Lengths of the contexts."""
    decode_tokens: int = 8
    """Tokens generated after each prefill; their median time is taken."""
    questions: tuple[int, ...] = ()
    """Also time a step of so many questions on one context, decoded together: `step_seconds_N` in the rows."""
    repeats: int = 3
    """Rounds at each context length; medians are taken."""
    warm_up_rounds: int = 1
    """Rounds of all with a token more than each context length before those that count: what is made for one length
    alone is left to the first of these (`first_round` in the rows)."""
    plot: str | None = None
    """Folder for time.png, memory.png, speedup.png; needs matplotlib: pip install 'nemo-star[plot]'."""
    overwrite: bool = False
    """Replace an output file that exists."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights; None: float32 on CPU, bfloat16 on GPU."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        unlike = [name for name in _LLAMA_HAS if getattr(self.model, name) != getattr(ModelConfig, name)]
        if unlike and any(candidate.kind == TRANSFORMERS for candidate in self.candidates):
            raise ValueError(f"compare=[{TRANSFORMERS}] runs a Llama, and model.{unlike[0]} is no Llama's")
        if len(set(self.candidates)) < len(self.compare):
            raise ValueError(f"compare: a word comes twice in {', '.join(self.compare)}")
        for key in ("compare", "context_tokens"):
            if not getattr(self, key):
                raise ValueError(f"{key} is empty: give at least one")
        if min(self.context_tokens) < 1 or self.decode_tokens < 1 or self.repeats < 1:
            raise ValueError("context_tokens, decode_tokens and repeats must be at least 1")
        if min(self.questions, default=1) < 1:
            raise ValueError(f"questions={list(self.questions)}: each must be at least 1")
        if self.warm_up_rounds < 0:
            raise ValueError(f"warm_up_rounds={self.warm_up_rounds} must be 0 or more")

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return tuple(Candidate.parse(word, others=(TRANSFORMERS,), options=tuple(OPTIONS)) for word in self.compare)
