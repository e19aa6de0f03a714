"""Keys of `nemo-star generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_star.config.parallel import ParallelConfig
from nemo_star.methods.config import AttentionConfig

DTYPES = ("float32", "bfloat16", "float16")
MIN_TEMPERATURE = 1e-3
MAX_SEED = 2**62


@dataclass(frozen=True)
class InferenceConfig:
    """How tokens are chosen and when generation ends (NeMo's names)."""

    tokens_to_generate: int = 128
    """No answer is longer."""
    greedy: bool = True
    """Take the likeliest token at every step; false: sample."""
    temperature: float = 1.0
    """Divides the logits before a token is sampled: below 1, likely tokens become likelier."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to at least top_p; 1 keeps all."""
    seed: int = 1234
    """A request is sampled with seed + its line index, so its answer does not depend on its neighbours."""
    end_strings: tuple[str, ...] = ()
    """Texts that end an answer and are not part of it."""
    ignore_eos: bool = False
    """Generate on after the model's end token, up to tokens_to_generate."""

    def __post_init__(self) -> None:
        if self.tokens_to_generate < 1:
            raise ValueError(f"inference.tokens_to_generate={self.tokens_to_generate} must be at least 1")
        if not MIN_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"inference.temperature={self.temperature} must be {MIN_TEMPERATURE} or more; "
                "for the likeliest token at every step: inference.greedy=true"
            )
        if self.top_k < 0:
            raise ValueError(f"inference.top_k={self.top_k} must be 0 (keep all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"inference.top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"inference.seed={self.seed} must be at least 0 and below {MAX_SEED}")
        if "" in self.end_strings:
            raise ValueError("inference.end_strings holds an empty string, which would end every answer at once")


@dataclass(frozen=True)
class CacheConfig:
    """How keys and values are cached."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of cached keys and values; None: the model's."""


@dataclass(frozen=True)
class GenerateConfig:
    """All keys of `nemo-star generate`; the recipes in `recipes/` set them."""

    checkpoint: str | None = None
    """Directory made by `nemo-star convert import`."""
    context: str | None = None
    """One question: the long text that it is about."""
    context_file: str | None = None
    """A file with the context instead; - is standard input."""
    query: str | None = None
    """One question: what is asked. The answer is streamed to standard output."""
    query_file: str | None = None
    """A file with the query instead; - is standard input."""
    input: str | None = None
    """Many questions instead: a file of JSON lines {"id", "context" | "context_ids", "query" | "query_ids"}."""
    output: str | None = None
    """File of JSON lines, one for each line of `input` in the same order; an existing one is refused unless resumed or
    overwritten."""
    resume: bool = False
    """Continue `output` where an earlier run ended."""
    overwrite: bool = False
    """Replace output files that exist."""
    output_logits: str | None = None
    """Safetensors file of logits: <id>/logits [new_tokens, vocab] float32."""
    chat_template: bool = False
    """Wrap context and query in the tokenizer's chat template as one user message (instruct models)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type the model computes in; None: float32 on CPU, bfloat16 on GPU."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError("checkpoint is not set: give checkpoint=DIR, a directory made by nemo-star convert import")
        if self.input is not None:
            single = [
                name for name in ("context", "context_file", "query", "query_file") if getattr(self, name) is not None
            ]
            if single:
                raise ValueError(f"input={self.input} goes without {', '.join(single)}: one JSONL file or one question")
        else:
            self._check_single("context")
            self._check_single("query")
            if self.context_file == "-" and self.query_file == "-":
                raise ValueError("context_file=- and query_file=- cannot both be read from standard input")
        self._check_output()

    def _check_single(self, name: str) -> None:
        text, file = getattr(self, name), getattr(self, f"{name}_file")
        if text is not None and file is not None:
            raise ValueError(f"{name} and {name}_file are both set: give one of them")
        if text is None and file is None:
            raise ValueError(
                f"no {name}: give {name}=TEXT or {name}_file=PATH (- is standard input), or input=FILE.jsonl"
            )

    def _check_output(self) -> None:
        if self.resume and self.overwrite:
            raise ValueError("resume=true and overwrite=true contradict each other")
        if self.resume and (self.output is None or self.input is None):
            raise ValueError("resume=true continues an output file: give input=FILE.jsonl and output=FILE.jsonl")
        if self.resume and self.output_logits is not None:
            raise ValueError(
                "resume=true and output_logits do not go together: the logits of earlier requests are gone"
            )
