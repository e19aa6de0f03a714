"""Star Attention inference for Megatron-core (arXiv 2411.17116)."""

import logging
import warnings

__version__ = "0.1.0"

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
    logging.getLogger(_name).addFilter(lambda record, start=_message: not record.getMessage().startswith(start))
