"""Keys of `nemo-star gpu-check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_star.config.benchmark import TRANSFORMERS
from nemo_star.config.compare import OPTIONS, Candidate


@dataclass(frozen=True)
class GpuCheckConfig:
    """All keys of `nemo-star gpu-check`."""

    output: str
    """Folder of results.json, results.md, and the log and rows of each step. Given again, it goes on: what is done with
    the same commit, settings and machine is not run again."""
    limits: dict[str, float]
    """Seconds that a step may take, by its name; then its processes are ended, and the next step runs."""
    model: tuple[str, ...]
    """Keys of nemo-star benchmark that make the model, e.g. model=llama3_1_8b; its weights are random."""
    context_tokens: tuple[int, ...]
    """Lengths of the contexts, each a step model_TOKENS."""
    repeats: tuple[int, ...]
    """Rounds at each of these lengths."""
    layers: tuple[int, ...]
    """Layers of the model at each of these lengths: methods' ratios do not depend on them, and K/V of long contexts
    leave no room for all."""
    blocks: tuple[int, ...]
    """Block sizes of the prefill kernels (step kernels), in tokens."""
    cached: tuple[int, ...]
    """Cached tokens of the decode kernels (step decode_kernels)."""
    decode_context_tokens: tuple[int, ...]
    """Lengths of the contexts after which the model decodes (step decode_model)."""
    decode_layers: int
    """Layers of the model in that step."""
    block_size: int = 32768
    """Block and anchor of star, in tokens."""
    compare: tuple[str, ...] = ("dense", "star:recompute", "star:shared")
    """What runs in turn in the steps model_TOKENS: as for nemo-star benchmark."""
    decode_compare: tuple[str, ...] = ("star:shared",)
    """The same in the step decode_model."""
    decode_tokens: int = 32
    """Tokens that step decode_model generates in a round; their median time is taken."""
    kernel_repeats: int = 20
    """Rounds of the kernels."""
    tests: tuple[str, ...] = ("-m", "gpu")
    """Which tests: arguments of pytest."""
    steps: tuple[str, ...] | None = None
    """Names of the steps to run, in their order; None: all."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What the steps run on; cpu tries the command itself."""

    def __post_init__(self) -> None:
        for key in ("repeats", "layers"):
            count = len(getattr(self, key))
            if count != len(self.context_tokens):
                raise ValueError(
                    f"{key} has {count} numbers for {len(self.context_tokens)} context_tokens: give one each"
                )
        for key in ("context_tokens", "repeats", "layers", "blocks", "cached", "decode_context_tokens"):
            values = getattr(self, key)
            if not values or min(values) < 1:
                raise ValueError(f"{key}={list(values)}: give at least one, each at least 1")
        for key in ("decode_layers", "block_size", "decode_tokens", "kernel_repeats"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        for name, seconds in self.limits.items():
            if seconds <= 0:
                raise ValueError(f"limits.{name}={seconds} must be above 0 seconds")
        for word in (*self.compare, *self.decode_compare):
            Candidate.parse(word, others=(TRANSFORMERS,), options=tuple(OPTIONS))
