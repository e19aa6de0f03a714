"""What a model runs with: checkpoint, type, attention, layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_star.config.parallel import ParallelConfig
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.registry import method_class

DTYPES = ("float32", "bfloat16", "float16")

_NO_VARIABLES = frozenset(
    "chat_template conversation messages tokenize add_generation_prompt continue_final_message sanitize_control_tokens "
    "padding truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs "
    "self".split()
)
"""Parameters of transformers' `apply_chat_template` that are not for the template."""


@dataclass(frozen=True)
class CacheConfig:
    """Cached keys and values."""

    dtype: Literal["float32", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2"] | None = None
    """Type of cached keys and values; None: the model's. In fp8 they take a
    byte each, and round more."""
    budget_gib: float | None = None
    """Memory of the fullest rank, in GiB, for the K/V of contexts that are kept for further questions; None: half of
    what the weights leave."""
    folder: str | None = None
    """Where contexts go that do not fit into it, and where a later run finds them; None: they are dropped."""

    def __post_init__(self) -> None:
        if self.budget_gib is not None and self.budget_gib <= 0:
            raise ValueError(f"cache.budget_gib={self.budget_gib} must be above 0")


@dataclass(frozen=True)
class DecodeConfig:
    """How a decode step gets to a GPU, which waits for the host; what it computes stays the same."""

    torch_linears: bool = False
    """Transformer Engine's linear layers and norms through torch's functions, which take less of the host."""
    cuda_graph: bool = False
    """Record a step of one token of each sequence as a CUDA graph, and replay it while the same sequences go on. Not
    with pipeline parallelism or windowed layers; experts where torch has grouped products for them."""


@dataclass(frozen=True)
class LLMConfig:
    """What `LLM` takes, and the keys that every tool with a checkpoint has."""

    checkpoint: str | None = None
    """Directory made by `nemo-star convert import`; or a Hugging Face directory, converted once into `cache_dir`."""
    cache_dir: str | None = None
    """Folder for what is converted so; None: nemo_star in $XDG_CACHE_HOME, or ~/.cache."""
    verify: bool = False
    """Compare the weight files with their checksums before loading, which reads them once more."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type the model computes in; None: float32 on CPU, bfloat16 on GPU."""
    chat_template: bool = False
    """Wrap context and query in the tokenizer's chat template as one user message (instruct models)."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as {enable_thinking: false}."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError(
                "checkpoint is not set: give checkpoint=DIR, a directory made by nemo-star convert import, or a "
                "Hugging Face directory"
            )
        check_template_kwargs(self.chat_template_kwargs)
        method_class(self.attention.kind)


def check_template_kwargs(values: Any) -> None:
    """Raises ValueError for what are no variables of a chat template; None is none of them."""
    if values is not None and not isinstance(values, Mapping):
        raise ValueError(f"chat_template_kwargs={values!r} must be a mapping")
    if reserved := sorted(set(values or {}) & _NO_VARIABLES):
        raise ValueError(f"chat_template_kwargs holds {', '.join(reserved)}: it takes variables of the template only")
