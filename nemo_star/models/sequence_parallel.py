"""Sequence parallelism over the tensor-parallel ranks, in prefill.

With it the hidden states between the layers' matrix products are [s / tp, b, h] on a rank instead of [s, b, h] on each
(arXiv 2205.05198): norms and residuals are divided, and an all-reduce becomes a reduce-scatter and an all-gather. Q, K,
V and so attention and the cache are those of the whole sequence as before.

A sequence must divide by tp, and one token does not: so the same modules run with it, where `encode` brings a block
whose length divides, and without it otherwise (a short last block, the query, generated tokens). Megatron's linear
layers, its own and Transformer Engine's, look at their attribute `sequence_parallel` in every forward: it is switched.
`config.sequence_parallel` stays false: it would make TransformerBlock fork CUDA random states, which inference does not
set up, and Megatron's `set_model_to_sequence_parallel` sets it and keeps every model alive in a cache of its module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.models.gpt import GPTModel
from torch import nn

from nemo_star.parallel.layout import Layout


def check_sequence_parallel(wanted: bool, layout: Layout, device_type: str) -> None:
    """Refuse sequence parallelism where it does not run.

    Raises:
        ValueError: on CPU, or without tensor parallelism.
    """
    if not wanted:
        return
    if layout.tp == 1:
        raise ValueError(
            "parallel.sequence_parallel=true divides the work between the layers over tensor-parallel ranks, and "
            "parallel.tensor_model_parallel_size is 1: set it to 2 or more, or leave sequence_parallel=false"
        )
    if device_type != "cuda":
        raise ValueError(
            f"parallel.sequence_parallel=true needs GPUs (Megatron's exchanges for it allocate on CUDA), and this is "
            f"{device_type}: leave it false"
        )


class SequenceParallel:
    """Switches the layers of one pipeline stage.

    Args:
        model: this stage's GPTModel. Its head is left alone: it runs on one position.
        tp: tensor-parallel size; 1 leaves everything as it is.
    """

    def __init__(self, model: GPTModel, tp: int) -> None:
        self.tp = tp
        self._active = False
        self._switches: list[tuple[nn.Module, str]] = []
        if tp > 1:
            self._find("sequence_parallel", model.decoder)
            if model.pre_process:
                self._find("reduce_scatter_embeddings", model.embedding)

    @contextmanager
    def over(self, tokens: int) -> Iterator[None]:
        """Run the stage on a sequence of so many tokens: with sequence parallelism if it divides, else without."""
        self._switch(self.tp > 1 and tokens > 0 and tokens % self.tp == 0)
        try:
            yield
        finally:
            self._switch(False)

    def length(self, tokens: int) -> int:
        """Length of this rank's hidden states, just now, for a sequence of so many tokens."""
        return tokens // self.tp if self._active else tokens

    def _find(self, name: str, inside: nn.Module) -> None:
        """Note every module that has this switch (also Transformer Engine's norms, where it changes nothing)."""
        found = [module for module in inside.modules() if isinstance(getattr(module, name, None), bool)]
        self._switches += [(module, name) for module in found]

    def _switch(self, active: bool) -> None:
        self._active = active
        for module, name in self._switches:
            setattr(module, name, active)
