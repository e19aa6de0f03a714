"""What sharded decode divides over the cp ranks, and whether that pays. Needs no torch: planned as it is run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nemo_star.config.model import ModelConfig
from nemo_star.parallel.layout import Layout

Sliced = Literal["ffn", "projection", "head"]


@dataclass(frozen=True)
class Costs:
    """What decides, on one type of device."""

    bytes_per_second: float
    """At which one rank reads weights in decode."""
    collective_seconds: float
    """Of an all-reduce of one token's hidden state between two ranks."""


COSTS = {
    # BENCHMARKS.md, "Decode on all ranks": two ranks on two cores read 11 GB/s each; gloo.
    "cpu": Costs(bytes_per_second=12e9, collective_seconds=0.85e-3),
    # Data sheets (HBM3 at 70%, NCCL within a node), not measured.
    "cuda": Costs(bytes_per_second=2.3e12, collective_seconds=25e-6),
}


def sliced_matrices(
    decode: str | None, model: ModelConfig, layout: Layout, *, itemsize: int, device_type: str
) -> frozenset[Sliced]:
    """The matrices of which a cp rank computes its share only; none in replicated decode.

    `sharded` divides the FFN and the head, and attention's output projection with tensor parallelism (no further
    collective) or where it gains. None divides where the FFN, and the projection, gain by it: an estimate from
    constants, not a measurement at start, because the same command must choose the same way every time.

    Args:
        decode: `parallel.decode`.
    """
    if layout.cp == 1 or decode == "replicated":
        return frozenset()
    elements = model.layer_matrices
    ffn, projection = (
        _gains(elements[name] // layout.tp * itemsize, layout, device_type) for name in ("ffn", "projection")
    )
    if decode is None and not ffn:
        return frozenset()
    projection = projection or (decode == "sharded" and layout.tp > 1)
    return frozenset({"ffn", "head", "projection"} if projection else {"ffn", "head"})


def _gains(weight_bytes: int, layout: Layout, device_type: str) -> bool:
    """Whether bytes not read save more time than the all-reduce over tp x cp takes longer than tp's."""
    costs = COSTS[device_type]
    saved = weight_bytes * (1 - 1 / layout.cp) / costs.bytes_per_second
    deeper = _depth(layout.tp * layout.cp) - _depth(layout.tp)
    return saved > deeper * costs.collective_seconds


def _depth(ranks: int) -> int:
    """Steps of a tree over the ranks."""
    return math.ceil(math.log2(ranks))


def weight_elements_read(model: ModelConfig, layout: Layout, sliced: frozenset[Sliced]) -> float:
    """Elements of all layers' matrices that one token reads on one tp rank, over all pipeline stages; not the head."""
    elements = model.layer_matrices
    read = sum(size / (layout.cp if name in sliced else 1) for name, size in elements.items())
    return read * model.num_layers / layout.tp
