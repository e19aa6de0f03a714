"""Keys of `nemo-star plan`: what is planned, on which machine, and how much of its peaks is reached."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from nemo_star.config.generate import CacheConfig
from nemo_star.config.model import ModelConfig
from nemo_star.config.parallel import ParallelConfig
from nemo_star.methods.config import AttentionConfig

KINDS = ("star:shared", "star:recompute", "ring", "ulysses", "dense")


@dataclass(frozen=True)
class LinkConfig:
    """A rank's connection to others."""

    bandwidth: float
    """Bytes per second in one direction."""
    hop_seconds: float = 0.0
    """What each hop adds to the time of a message."""

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or self.hop_seconds < 0:
            raise ValueError(
                f"a link with bandwidth {self.bandwidth} and hop_seconds {self.hop_seconds}: "
                "bandwidth must be above 0 bytes/s, hop_seconds at least 0"
            )


@dataclass(frozen=True)
class MachineConfig:
    """What one rank computes on, by its data sheet (conf/machine). Per rank: FLOP/s, bytes, bytes per second."""

    name: str
    """What tables call it."""
    device: Literal["cuda", "cpu"]
    """What decides the type of weights and the kernels that are planned for."""
    peak_bf16_flops: float
    """FLOP/s in 16 bits, dense: without sparsity."""
    peak_fp32_flops: float
    """FLOP/s in float32."""
    memory_bytes: float
    """Memory of one rank."""
    memory_bandwidth: float
    """Bytes per second that one rank reads of its memory."""
    devices_per_node: int
    """Ranks that node_link connects; beyond them it is network_link."""
    node_link: LinkConfig
    """Inside a node."""
    network_link: LinkConfig
    """From node to node."""
    collective_seconds: float
    """What a collective of a few bytes takes, before its hops."""
    layer_seconds: float = 0.0
    """What issuing the operations of one layer takes the host, where nothing hides it."""
    overlaps: bool = True
    """Whether communication runs beside computation; on a CPU the core that computes also copies."""
    dense_takes_node: bool = False
    """Dense attention, on its single rank, computes with the whole node: a CPU's cores are threads."""
    process_bytes: float = 0.0
    """Memory of a process before it has a model, where that counts as the rank's."""

    def __post_init__(self) -> None:
        for name in (
            "peak_bf16_flops",
            "peak_fp32_flops",
            "memory_bytes",
            "memory_bandwidth",
            "devices_per_node",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"machine.{name}={getattr(self, name)} must be above 0")
        for name in ("collective_seconds", "layer_seconds", "process_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"machine.{name}={getattr(self, name)} must be at least 0")


@dataclass(frozen=True)
class EfficiencyConfig:
    """Reached share of a machine's peaks, one value for every machine, model and length (recipes/plan.yaml has why)."""

    gemm: float = 0.75
    """Of the peak FLOP/s, by matrix products."""
    attention: float = 0.67
    """Of the peak FLOP/s, by attention in prefill."""
    memory: float = 0.85
    """Of the memory's bandwidth."""
    link: float = 0.7
    """Of the links' bandwidth."""
    usable_memory: float = 0.9
    """Share of the memory that a plan may fill; not used for times."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if not 0 < getattr(self, item.name) <= 1:
                raise ValueError(f"efficiency.{item.name}={getattr(self, item.name)} must be above 0 and at most 1")


@dataclass(frozen=True)
class PlanConfig:
    """All keys of `nemo-star plan`."""

    model: ModelConfig
    machine: MachineConfig
    context_tokens: int = 131072
    """Length of the context."""
    world_size: int = 8
    """Ranks of the plan: tp * pp * cp of one replica. No process is started."""
    compare: tuple[str, ...] = KINDS
    """What to plan: star:shared, star:recompute, ring, ulysses, dense."""
    output: str | None = None
    """JSON file of the tables."""
    overwrite: bool = False
    """Replace an output file that exists."""
    check: str | None = None
    """File of `nemo-star benchmark output=FILE` to compare with a plan of the same runs; give their model=, machine=,
    dtype=."""
    validate: bool = False
    """Compare with published tables, cell by cell, instead of planning."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; None: bfloat16 on GPU, float32 on CPU."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)

    def __post_init__(self) -> None:
        for method in self.compare:
            if method not in KINDS:
                raise ValueError(f"compare: {method!r} is unknown; known: {', '.join(KINDS)}")
        if not self.compare:
            raise ValueError("compare is empty: give at least one method")
        for name in ("context_tokens", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.validate and self.check is not None:
            raise ValueError(f"validate=true and check={self.check} are two comparisons: ask for one of them")
