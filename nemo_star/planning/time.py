"""Seconds of a prefill and of a decoded token: work over the share of a machine's peak that is reached.

The estimate has four constants (`EfficiencyConfig`), the same for every machine, model, method and length. It counts
what a rank computes, reads and exchanges; waiting for one another, imbalance between machines and Python are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_star.config.plan import EfficiencyConfig, LinkConfig, MachineConfig
from nemo_star.methods.method import Exchange
from nemo_star.methods.partition import Block
from nemo_star.parallel.decode_slices import weight_elements_read
from nemo_star.parallel.experts import ExpertLayout
from nemo_star.planning.memory import kv_bytes_read
from nemo_star.planning.work import RankWork, Workload, rank_work, stage_windows

HIDDEN_PASSES, ROTARY_PASSES, GATE_PASSES = 42, 10, 5
"""Reads and writes of memory that the layer's elementwise operations take, counted in elements of the model's type for
each element of the hidden state (two norms that compute in float32: 2 * 18; two residual additions: 2 * 3), of
queries and keys (rotary: two products, rotated halves, a sum) and of the FFN (activation 2, product 3)."""


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer for one block on one rank; `ffn` includes its activation, `exposed` is communication."""

    qkv: float
    attention: float
    projection: float
    ffn: float
    other: float
    exposed: float

    @property
    def total(self) -> float:
        return self.qkv + self.attention + self.projection + self.ffn + self.other + self.exposed


@dataclass(frozen=True)
class Clock:
    """A machine with the shares of its peaks that are reached."""

    machine: MachineConfig
    efficiency: EfficiencyConfig

    def devices(self, work: Workload) -> int:
        """Devices that one rank computes with: a node's cores for a method that runs on one CPU rank, else one."""
        alone = not work.method.shares_context and self.machine.dense_takes_node
        return self.machine.devices_per_node if alone else 1

    def matrix_seconds(self, work: Workload, tokens: int, elements: float) -> float:
        """Tokens through a matrix, which has to be read, too: with few tokens that takes longer."""
        computing = 2 * tokens * elements / (self._peak(work) * self.efficiency.gemm)
        return max(computing, self.memory_seconds(work, elements * work.dtype_bytes))

    def attention_seconds(self, work: Workload, flops: float) -> float:
        return flops / (self._peak(work) * self.efficiency.attention)

    def memory_seconds(self, work: Workload, size: float) -> float:
        return size / (self.machine.memory_bandwidth * self.devices(work) * self.efficiency.memory)

    def link(self, span: int) -> LinkConfig:
        """What connects ranks of which the furthest are `span` apart."""
        return self.machine.node_link if span <= self.machine.devices_per_node else self.machine.network_link

    def exchange(self, size: float, ranks: int, span: int, *, steps: int = 1) -> float:
        """A collective in which each rank moves `size` bytes, `steps` times through a tree of the ranks."""
        if ranks == 1:
            return 0.0
        link = self.link(span)
        latency = self.machine.collective_seconds + steps * math.ceil(math.log2(ranks)) * link.hop_seconds
        return latency + size / (link.bandwidth * self.efficiency.link)

    def all_reduce(self, size: float, ranks: int, span: int) -> float:
        return self.exchange(2 * size * (ranks - 1) / ranks, ranks, span, steps=2)

    def _peak(self, work: Workload) -> float:
        peak = self.machine.peak_fp32_flops if work.dtype == "float32" else self.machine.peak_bf16_flops
        return peak * self.devices(work)


def layer_time(work: Workload, clock: Clock, rank: RankWork, block: Block, window: int | None = None) -> LayerTime:
    """One layer for one block of a rank; with a window, one that is windowed."""
    model, tp = work.model, work.layout.tp
    tokens = work.method.tokens_in_flight(block)
    matrices = {
        name: clock.matrix_seconds(work, tokens, elements / tp) for name, elements in model.layer_matrices.items()
    }
    method = work.method
    if window is None:
        pairs, exchanges = method.rank_pairs(block, rank.share), method.exchanges(block, rank.share, work.heads)
    else:
        pairs = method.rank_windowed_pairs(block, rank.share, window)
        exchanges = method.windowed_exchanges(block, rank.share, work.heads, window)
    attention = clock.attention_seconds(work, model.pair_flops * pairs / tp)
    gate = GATE_PASSES * model.ffn_channels / tp
    other = HIDDEN_PASSES * model.hidden_size + ROTARY_PASSES * (work.heads.query + work.heads.kv)
    gate_seconds, other_seconds = (
        clock.memory_seconds(work, passes * tokens * work.dtype_bytes) for passes in (gate, other)
    )
    computing = sum(matrices.values()) + attention + gate_seconds + other_seconds
    exposed = _tensor_parallel(work, clock, tokens) + _context_parallel(work, clock, exchanges, computing, attention)
    return LayerTime(
        matrices["qkv"],
        attention,
        matrices["projection"],
        matrices["ffn"] + gate_seconds,
        other_seconds + clock.machine.layer_seconds,
        exposed,
    )


def prefill_seconds(work: Workload, clock: Clock) -> float:
    """Seconds of the slowest rank: its blocks through its layers, after the stages before it have had the first one."""
    stages = work.layout.pp
    slowest = 0.0
    for rank in rank_work(work):
        times = [(_stage_seconds(work, clock, rank, block), block, count) for block, count in rank.blocks]
        if times:
            passing, block, _ = max(times, key=lambda time: time[0])
            size = work.method.tokens_in_flight(block) * work.model.hidden_size * work.dtype_bytes
            fill = (stages - 1) * (passing + clock.exchange(size, min(stages, 2), _pipeline_span(work)))
            if stages > 1:  # the last stage has less to do: it is done with its last block sooner
                fill -= _left_out_seconds(work, clock, rank, block)
            slowest = max(slowest, sum(seconds * count for seconds, _, count in times) + fill)
    return slowest


def _stage_seconds(work: Workload, clock: Clock, rank: RankWork, block: Block) -> float:
    """One block through the first stage, which has most to do."""
    layers = stage_windows(work.model, work.layout.pp, 0)
    seconds = sum(count * layer_time(work, clock, rank, block, window).total for window, count in layers.items())
    return seconds - (_left_out_seconds(work, clock, rank, block) if work.layout.pp == 1 else 0.0)


def _left_out_seconds(work: Workload, clock: Clock, rank: RankWork, block: Block) -> float:
    """What the last layer does not do: all that it is there for are keys and values."""
    if work.completes_prefill:
        return 0.0
    last = layer_time(work, clock, rank, block, work.model.window_of(work.model.num_layers - 1))
    return last.attention + last.ffn + last.exposed


def decode_seconds(work: Workload, clock: Clock) -> float:
    """Seconds of one token: weights and K/V read once, and what the collectives take. A lower bound on GPUs, and where
    K/V in fp8 are converted before a kernel reads them."""
    model, layout = work.model, work.layout
    query = model.query_width
    sliced = work.sliced
    sharded = layout.cp if sliced else 1
    attending = layout.cp if "projection" in sliced else 1
    head = model.vocab_size * model.hidden_size / layout.tp / sharded
    read = (weight_elements_read(model, layout, sliced) + head) * work.dtype_bytes
    tokens = max(rank.tokens for rank in rank_work(work))
    read += sum(kv_bytes_read(work, stage, tokens) for stage in range(layout.pp))
    hidden = model.hidden_size * work.dtype_bytes
    span = layout.tp * layout.cp
    layer = clock.machine.layer_seconds + clock.all_reduce(hidden, layout.tp * attending, layout.tp * attending)
    layer += clock.all_reduce(hidden, layout.tp * sharded, layout.tp * sharded)
    partial = (query + model.num_attention_heads) / layout.tp * 4  # float32 out and lse of each cp rank
    layer += clock.exchange(partial * (layout.cp - 1), layout.cp, span)
    choice = clock.exchange(16, span * layout.pp, span * layout.pp)  # token and "end" from the first rank to all
    logits = clock.exchange(4 * model.vocab_size, layout.tp * sharded, layout.tp * sharded)
    passing = (layout.pp - 1) * clock.exchange(hidden, 2, _pipeline_span(work))
    passing += clock.exchange(4 * model.vocab_size, min(layout.pp, 2), _pipeline_span(work))
    return clock.memory_seconds(work, read) + model.num_layers * layer + logits + passing + choice


def _tensor_parallel(work: Workload, clock: Clock, tokens: int) -> float:
    """The two all-reduces of a layer, which nothing hides; experts divided over cp ranks get the tokens of all of them,
    and sum in float32."""
    layout, elements = work.layout, tokens * work.model.hidden_size
    once = clock.all_reduce(elements * work.dtype_bytes, layout.tp, layout.tp)
    if work.model.moe is None or not ExpertLayout(layout).over_cp:
        return 2 * once
    ranks = layout.tp * layout.cp
    gathered = clock.exchange(elements * (layout.cp - 1) * work.dtype_bytes, layout.cp, ranks)
    return once + gathered + clock.all_reduce(elements * layout.cp * 4, ranks, ranks)


def _context_parallel(
    work: Workload, clock: Clock, exchanges: Sequence[Exchange], computing: float, attention: float
) -> float:
    """What a layer waits for other cp ranks."""
    if work.layout.cp == 1:
        return 0.0
    span = work.layout.tp * work.layout.cp
    waited = 0.0
    for exchange in exchanges:
        seconds = clock.exchange(exchange.elements * work.dtype_bytes, exchange.ranks, span) / exchange.blocks
        if clock.machine.overlaps:
            seconds -= exchange.beside_attention * attention + exchange.beside_layer * computing
        waited += exchange.times * max(0.0, seconds)
    return waited


def _pipeline_span(work: Workload) -> int:
    """Neighbouring stages lie tp * cp ranks apart; they share a node if all stages do."""
    return work.layout.tp * work.layout.cp * work.layout.pp
