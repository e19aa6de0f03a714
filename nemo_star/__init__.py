"""Star Attention inference for Megatron-core (arXiv 2411.17116)."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_star.config.sampling import SamplingParams
    from nemo_star.llm.front import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams"]

_HOMES = {"LLM": "nemo_star.llm.front", "SamplingParams": "nemo_star.config.sampling"}


def _says_more(start: str, record: logging.LogRecord) -> bool:
    """Whether a log record is another one than that which begins so."""
    return not record.getMessage().startswith(start)


# Megatron-core warns at its import that training helpers are absent (Transformer Engine's and Apex's optimizers, absl's
# log) and makes torch look for a CUDA toolkit to compile with; Megatron 0.19 also announces what it wants to remove
# some day (pyproject.toml holds the releases that this package runs with). None of it is for a user: which kernels and
# layers are used is reported by the engine itself.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed. Falling back to Torch Norm",
    "absl.logging is not installed",
):
    warnings.filterwarnings("ignore", message=_message, category=UserWarning)
for _name, _message in (
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated"),
):
    logging.getLogger(_name).addFilter(partial(_says_more, _message))


def __getattr__(name: str) -> Any:
    """The front door, imported when it is asked for: torch and Megatron take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "LLM" and "megatron.core" not in sys.modules:
        from nemo_star.runtime.transformer_engine import prepare_imports

        prepare_imports()
    return getattr(importlib.import_module(_HOMES[name]), name)
