"""A recipe as strict dataclasses.

Hydra composes YAML and command-line overrides; `parse` turns the result into the dataclasses below and refuses
unknown or ill-typed keys by name. Values are checked here as far as they can be without a model or a process group.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

ATTENTION_KINDS = ("star", "dense", "ring", "ulysses")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_BLOCKS = 4
MAX_DEFAULT_BLOCK_SIZE = 32768
SMALL_BLOCK_TOKENS = 16
MIN_TEMPERATURE = 1e-3
MOST_SEED = 2**62
MLP_CHUNK_TOKENS = 4096
"""Tokens that go through an MLP at once; its intermediate result is several times as large as the hidden states."""
MOST_MINUTES = 60 * 24 * 365


@dataclass(frozen=True)
class AttentionConfig:
    """How the context attends (paper section 2). Sizes are in tokens; a kind keeps fields it does not use."""

    kind: str = "star"
    block_size: int | None = None
    """Tokens of one context block; None: ceil(context / 4), at most 32,768."""
    anchor_size: int | None = None
    """Tokens of the anchor, the start of the first block; None: the block size; 0: no anchor."""
    anchor: Literal["shared", "recompute"] = "shared"
    """`shared` computes the anchor once and hands its K/V to the other ranks; `recompute` runs its tokens through the
    model again for every block, as the paper does. Same result up to rounding."""
    kernel: Literal["auto", "te", "flash", "cpu", "math"] = "auto"

    def __post_init__(self) -> None:
        if self.kind not in ATTENTION_KINDS:
            raise ValueError(f"attention.kind={self.kind!r} is unknown; known kinds: {', '.join(ATTENTION_KINDS)}")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"attention.block_size={self.block_size} must be at least 1 token")
        if self.anchor_size is not None and self.anchor_size < 0:
            raise ValueError(f"attention.anchor_size={self.anchor_size} must be 0 (no anchor) or more tokens")
        if self.block_size is not None and self.anchor_size is not None and self.anchor_size > self.block_size:
            raise ValueError(
                f"attention.anchor_size={self.anchor_size} is larger than attention.block_size={self.block_size}: "
                "the anchor is a part of the first block"
            )

    def sizes(self, context_tokens: int) -> tuple[int, int]:
        """(block size, anchor size) in tokens for a context of `context_tokens` tokens."""
        if self.kind != "star":
            return context_tokens, 0
        default = min(-(-context_tokens // DEFAULT_BLOCKS), MAX_DEFAULT_BLOCK_SIZE)
        block_size = default if self.block_size is None else self.block_size
        anchor_size = block_size if self.anchor_size is None else self.anchor_size
        if anchor_size > block_size:
            raise ValueError(
                f"attention.anchor_size={anchor_size} is larger than the block size {block_size} "
                f"(ceil({context_tokens} / {DEFAULT_BLOCKS}), because attention.block_size is not set): "
                "the anchor is a part of the first block"
            )
        return block_size, anchor_size


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the process groups; data parallel is what remains of the world size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int | None = None
    """None: all ranks that tp and pp leave over (for dense attention: 1)."""
    decode: Literal["replicated", "sharded"] | None = None
    """How cp ranks divide decode: attention always; `sharded` also the FFN and the head, which `replicated` runs
    on each. None: `sharded` where an estimate says that it pays."""
    sequence_parallel: bool = False
    """Prefill on GPUs with tensor parallelism: hidden states are divided over the tp ranks between matrix products."""
    timeout_minutes: float = 30.0
    """The job ends when no rank has finished a layer or a request for so long; work that goes on has no limit."""

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"parallel.{name}={size} must be at least 1")
        if not 0 < self.timeout_minutes <= MOST_MINUTES:
            raise ValueError(f"parallel.timeout_minutes={self.timeout_minutes} must be above 0, at most {MOST_MINUTES}")


@dataclass(frozen=True)
class InferenceConfig:
    """How tokens are chosen and when generation ends (NeMo's names)."""

    tokens_to_generate: int = 128
    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to at least top_p; 1 keeps all."""
    seed: int = 1234
    """A request is sampled with seed + its line index, so its answer does not depend on its neighbours."""
    end_strings: tuple[str, ...] = ()
    ignore_eos: bool = False

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
        if not 0 <= self.seed < MOST_SEED:
            raise ValueError(f"inference.seed={self.seed} must be at least 0 and below {MOST_SEED}")
        if "" in self.end_strings:
            raise ValueError("inference.end_strings holds an empty string, which would end every answer at once")


@dataclass(frozen=True)
class CacheConfig:
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of cached keys and values; None: the model's."""


@dataclass(frozen=True)
class GenerateConfig:
    """All keys of `tools/generate.py`; the recipes in `recipes/` set them."""

    checkpoint: str | None = None
    context: str | None = None
    context_file: str | None = None
    query: str | None = None
    query_file: str | None = None
    input: str | None = None
    output: str | None = None
    resume: bool = False
    overwrite: bool = False
    output_logits: str | None = None
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
            raise ValueError(
                "checkpoint is not set: give checkpoint=DIR, a directory made by tools/convert_checkpoint.py import"
            )
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


@dataclass(frozen=True)
class ShapeConfig:
    """Shape of a model with random weights, in the words of Megatron's TransformerConfig."""

    num_layers: int = 8
    hidden_size: int = 512
    num_attention_heads: int = 8
    num_query_groups: int = 2
    ffn_hidden_size: int = 2048
    vocab_size: int = 32000


@dataclass(frozen=True)
class KindToCompare:
    """A word of `compare`: attention[:anchor][+decode:MODE], or transformers."""

    word: str
    attention: str
    anchor: str | None
    decode: str | None

    @classmethod
    def parse(cls, word: str) -> KindToCompare:
        """Raises ValueError for a word that means nothing, with those that do."""
        main, plus, mode = word.partition("+")
        attention, colon, anchor = main.partition(":")
        option, _, decode = mode.partition(":")
        known = attention in (*ATTENTION_KINDS, "transformers")
        right_anchor = not colon or (attention == "star" and anchor in ("shared", "recompute"))
        right_decode = not plus or (option == "decode" and decode in ("replicated", "sharded"))
        divisible = attention not in ("dense", "transformers") or not plus
        if not (known and right_anchor and right_decode and divisible):
            raise ValueError(
                f"compare: {word!r} is unknown; known: star:shared, star:recompute, ring, ulysses, each with "
                "+decode:sharded or +decode:replicated if wanted, and dense, transformers"
            )
        return cls(word, attention, anchor or None, decode or None)


@dataclass(frozen=True)
class BenchmarkConfig:
    """All keys of `tools/benchmark.py`."""

    output: str | None = None
    compare: tuple[str, ...] = ("star:shared", "star:recompute", "ring", "ulysses", "dense")
    """Kinds to run in turn: `attention[:anchor][+decode:sharded|replicated]`, or `transformers`."""
    context_tokens: tuple[int, ...] = (4096, 16384)
    decode_tokens: int = 8
    """Tokens generated after each prefill; their median time is taken."""
    repeats: int = 3
    warm_up_rounds: int = 1
    """Rounds of all kinds at each context length before those that count."""
    plot: str | None = None
    """Folder for time.png, memory.png, speedup.png."""
    overwrite: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    model: ShapeConfig = field(default_factory=ShapeConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if len(set(self.kinds)) < len(self.compare):
            raise ValueError(f"compare: a kind comes twice in {', '.join(self.compare)}")
        for key in ("compare", "context_tokens"):
            if not getattr(self, key):
                raise ValueError(f"{key} is empty: give at least one")
        if min(self.context_tokens) < 1 or self.decode_tokens < 1 or self.repeats < 1:
            raise ValueError("context_tokens, decode_tokens and repeats must be at least 1")
        if self.warm_up_rounds < 0:
            raise ValueError(f"warm_up_rounds={self.warm_up_rounds} must be 0 or more")

    @property
    def kinds(self) -> tuple[KindToCompare, ...]:
        return tuple(map(KindToCompare.parse, self.compare))


Config = TypeVar("Config")


def parse(cls: type[Config], values: Mapping[str, Any], *, prefix: str = "") -> Config:
    """Build the dataclass `cls` from nested plain values.

    Raises:
        ValueError: a key that `cls` does not have, or a value of the wrong type; the message names the full key.
    """
    hints = typing.get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    unknown = [f"{prefix}{key}" for key in values if key not in known]
    if unknown:
        raise ValueError(
            f"unknown key {', '.join(unknown)}; known keys here: {', '.join(prefix + key for key in known)}"
        )
    built = {}
    for name, item in known.items():
        if name in values:
            built[name] = _convert(hints[name], values[name], f"{prefix}{name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"missing key {prefix}{name}")
    return cls(**built)


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`, or a ValueError that names the key, the value and what would be right."""
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{key}={value!r} must be a group of keys")
        return parse(hint, value, prefix=f"{key}.")
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
        return _convert(hint, value, key)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{key}={value!r} must be one of: {', '.join(typing.get_args(hint))}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ValueError(f"{key}={value!r} must be a list")
        return tuple(_convert(typing.get_args(hint)[0], item, key) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{key}={value!r} must be a mapping")
        return {name: _convert(typing.get_args(hint)[1], item, f"{key}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{key}={value!r} must be of type {hint.__name__}")
    return value
