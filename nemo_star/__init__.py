"""Star Attention inference for Megatron-core (arXiv 2411.17116)."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_star.config.sampling import SamplingParams
    from nemo_star.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams"]

_HOMES = {"LLM": "nemo_star.llm", "SamplingParams": "nemo_star.config.sampling"}

# Importing Megatron-core warns five times that training helpers of Transformer Engine and Apex are absent. None of
# them is used in inference; which kernels are used is reported by the engine itself.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed", category=UserWarning)
warnings.filterwarnings("ignore", message="Apex is not installed. Falling back to Torch Norm", category=UserWarning)


def __getattr__(name: str) -> Any:
    """The front door, imported when it is asked for: torch and Megatron take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "LLM" and "megatron.core" not in sys.modules:
        from nemo_star.runtime.transformer_engine import prepare_imports

        prepare_imports()
    return getattr(importlib.import_module(_HOMES[name]), name)
