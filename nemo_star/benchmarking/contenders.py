"""What is compared: attention methods in our engine, and transformers' own generation, on the same random weights."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist

from nemo_star.attention.step import AttentionState
from nemo_star.benchmarking.probe import time_cache_reads
from nemo_star.config.benchmark import TRANSFORMERS, BenchmarkConfig
from nemo_star.config.compare import Candidate
from nemo_star.config.llm import DecodeConfig
from nemo_star.config.model import ModelConfig
from nemo_star.engine.build import attention_state, engine_around
from nemo_star.engine.context import EncodedContext
from nemo_star.engine.engine import Engine
from nemo_star.engine.graphs import check_graphs
from nemo_star.kernels.registry import get_merge
from nemo_star.kernels.settle import names
from nemo_star.kernels.stored import stored_type
from nemo_star.methods.dense import Dense
from nemo_star.methods.method import Method
from nemo_star.models.build import build_model
from nemo_star.models.rotary import build_rotary, build_windowed_rotary
from nemo_star.models.torch_linears import check_torch_linears
from nemo_star.parallel.decode_slices import Sliced, sliced_matrices, weight_elements_read
from nemo_star.parallel.experts import check_experts
from nemo_star.parallel.groups import Groups
from nemo_star.parallel.layout import Layout, check_layout
from nemo_star.planning.flops import prefill_flops
from nemo_star.runtime.memory import peak_memory_bytes, reset_peak_memory

QUERY = [1]
ALONE = Layout(tp=1, cp=1, dp=1, pp=1)

Weights = dict[str, torch.Tensor]
"""Parameters by name, of one rank's share of the model."""


class Contender(Protocol):
    """One candidate to measure, on every rank; a rank that does not take part gives no sample."""

    candidate: Candidate
    method: Method
    layout: Layout
    dtype: torch.dtype
    sliced: frozenset[Sliced]
    """What decode divides over cp; nothing: replicated."""
    cache_dtype: torch.dtype | None
    """Of cached K/V; None: `dtype`."""

    def sample(self, context: list[int], decode_tokens: int) -> dict[str, Any] | None:
        """Times and sizes of one prefill and decode on this rank."""


@dataclasses.dataclass
class OnEngine:
    """An attention method in our engine."""

    candidate: Candidate
    method: Method
    layout: Layout
    dtype: torch.dtype
    sliced: frozenset[Sliced]
    engine: Engine | None
    """None on a rank that only waits (dense runs on rank 0)."""
    questions: tuple[int, ...] = ()
    """Numbers of them that decode together, timed beside one."""
    cache_dtype: torch.dtype | None = None

    def sample(self, context: list[int], decode_tokens: int) -> dict[str, Any] | None:
        engine = self.engine
        if engine is None:
            return None
        with all_cores(self.layout == ALONE and engine.device.type == "cpu"):
            reset_peak_memory(engine.device)
            encoded = engine.encode(context)
            prefill = engine.prefill_report(encoded)
            kv_bytes = encoded.cache.nbytes
            marks = []
            asked = time.perf_counter()
            for _ in engine.generate(
                encoded, QUERY, max_tokens=decode_tokens + 1, choose=lambda logits: (int(logits.argmax()), False)
            ):
                marks.append(time.perf_counter())
            peak = peak_memory_bytes(engine.device)
            reads = time_cache_reads(engine, encoded)
            steps = {
                f"step_seconds_{count}": _step_seconds(engine, encoded, count, decode_tokens)
                for count in self.questions
            }
        return {
            "prefill_seconds": prefill.seconds,
            "first_token_seconds": marks[0] - asked,
            "decode_seconds_per_token": median_step(marks),
            "kv_bytes_per_rank": kv_bytes,
            "peak_memory_bytes": peak,
            "anchor_wait_seconds": encoded.waited_seconds,
            **reads,
            **steps,
        }


def _step_seconds(engine: Engine, context: EncodedContext, questions: int, steps: int) -> float:
    """Median time of a decode step of so many questions on one context."""
    sequences = [engine.sequence(context) for _ in range(questions)]
    marks = []
    for _ in range(steps + 1):
        engine.decode([(sequence, QUERY) for sequence in sequences])
        engine.agree([(QUERY[0], False)] * questions if engine.groups.replica.rank() == 0 else None, questions)
        engine.synchronize()
        marks.append(time.perf_counter())
    return median_step(marks)


@dataclasses.dataclass
class OnTransformers:
    """Hugging Face's `generate` on rank 0 with all cores, from a copy of the weights made for each sample."""

    candidate: Candidate
    method: Method
    layout: Layout
    dtype: torch.dtype
    sliced: frozenset[Sliced]
    model: ModelConfig
    weights: Weights | None
    """Whole, or None on a rank that only waits."""
    cache_dtype: torch.dtype | None = None

    def sample(self, context: list[int], decode_tokens: int) -> dict[str, Any] | None:
        if self.weights is None:
            return None
        from nemo_star.benchmarking.hugging_face import build_llama, timed_generation

        llama = build_llama(self.model, self.weights)
        with all_cores(llama.device.type == "cpu"):
            reset_peak_memory(llama.device)
            started = time.perf_counter()
            _, marks, kv_bytes = timed_generation(llama, context + QUERY, decode_tokens + 1)
            peak = peak_memory_bytes(llama.device)
        del llama
        gc.collect()
        return {
            "prefill_seconds": marks[0] - started,  # with the query's one token: generate knows no context
            "decode_seconds_per_token": median_step(marks),
            "kv_bytes_per_rank": kv_bytes,
            "peak_memory_bytes": peak,
        }


def build_contenders(
    config: BenchmarkConfig, model: ModelConfig, shared: tuple[Layout, Groups], alone: Groups
) -> list[Contender]:
    """All candidates of `config.compare`; those of one layout share their weights (with tp or pp, each rank draws its
    own from the same seed, so that dense and transformers then run on other weights of the same distribution).

    Args:
        shared: layout and groups of the methods that share a context.
        alone: groups in which each rank is by itself, for what runs on rank 0.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = getattr(torch, config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    merge = get_merge(config.parallel.merge, device)
    cache_dtype = stored_type(config.cache.dtype) if config.cache.dtype else None
    drawn: dict[Layout, Weights] = {}
    contenders: list[Contender] = []
    for candidate in config.candidates:
        # transformers computes dense attention, on one rank and its weights.
        method = (
            Dense(config.attention) if candidate.kind == TRANSFORMERS else candidate.method(config.attention, model)
        )
        place = shared if method.shares_context else (ALONE, alone)
        layout = place[0]
        check_layout(model, layout, method)
        check_experts(model, layout, sequence_parallel=config.parallel.sequence_parallel)
        divides = candidate.decode or config.parallel.decode
        sliced = sliced_matrices(divides, model, layout, itemsize=dtype.itemsize, device_type=device.type)
        steps = DecodeConfig(torch_linears=candidate.torch_linears, cuda_graph=candidate.cuda_graph)
        if steps.cuda_graph:
            check_graphs(model, layout, device, dtype)
        if steps.torch_linears:
            check_torch_linears(device, dtype)
        engine = None
        if method.shares_context or dist.get_rank() == 0:
            divided = config.parallel.sequence_parallel and layout.tp > 1  # dense runs on one rank
            state = attention_state(
                method.settings,
                place[1],
                device=device,
                dtype=dtype,
                cache_dtype=cache_dtype,
                divides_decode=bool(sliced),
            )
            state.merge = merge
            engine = _engine(
                state,
                model,
                place,
                drawn,
                dtype=dtype,
                device=device,
                sliced=sliced,
                sequence_parallel=divided,
                decode=steps,
            )
        facts = (candidate, method, layout, dtype, sliced)
        if candidate.kind == TRANSFORMERS:
            contenders.append(OnTransformers(*facts, model, drawn[ALONE] if engine else None))
        else:
            contenders.append(OnEngine(*facts, engine, config.questions, cache_dtype))
    return contenders


def _engine(
    state: AttentionState,
    model: ModelConfig,
    place: tuple[Layout, Groups],
    drawn: dict[Layout, Weights],
    *,
    dtype: torch.dtype,
    device: torch.device,
    sliced: frozenset[Sliced],
    sequence_parallel: bool,
    decode: DecodeConfig,
) -> Engine:
    """An engine with the weights in `drawn`, which gets them if it is the first of its tp and pp."""
    layout, groups = place
    built = build_model(model, state=state, groups=groups, dtype=dtype, device=device)
    weights_layout = dataclasses.replace(layout, cp=1)
    if weights_layout not in drawn:
        _draw(built)
        drawn[weights_layout] = {name: weight.data for name, weight in built.named_parameters()}
    for name, weight in built.named_parameters():
        weight.data = drawn[weights_layout][name]
    return engine_around(
        built,
        state,
        groups,
        rotary=build_rotary(model, device),
        windowed_rotary=build_windowed_rotary(model, device),
        vocab_size=model.vocab_size,
        sliced=sliced,
        sequence_parallel=sequence_parallel,
        decode=decode,
    )


def _draw(built: torch.nn.Module) -> None:
    """Random weights of a usual size, norms near one; the same on every run on one kind of device, which draws them:
    8 billion take a CPU's core over a minute."""
    device = next(built.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for weight in built.parameters():
        values = torch.randn(weight.shape, generator=generator, device=device) * 0.02
        weight.data.copy_(values + (1.0 if weight.dim() == 1 else 0.0))


def counted(contender: Contender, model: ModelConfig, tokens: int) -> dict[str, Any]:
    """What a row tells that is known or counted, not measured; `kernel` on ranks that run the method."""
    method, layout = contender.method, contender.layout
    block_size, anchor_size = method.sizes(tokens)
    on_transformers = contender.candidate.kind == TRANSFORMERS  # whose layers all run whole
    state = contender.engine.state if isinstance(contender, OnEngine) and contender.engine else None
    return {
        "kernel": names(state.kernel, state.decode_kernel) if state else None,
        "block_size": block_size,
        "anchor_size": anchor_size,
        "overlap_size": method.pinned(tokens).overlap_size,
        "prefill_flops": prefill_flops(model, method, tokens, layout.cp, complete=on_transformers),
        # Of a rank: all stages would be read by one token, a rank has one of them.
        "decode_weight_bytes": int(
            weight_elements_read(model, layout, contender.sliced) * contender.dtype.itemsize / layout.pp
        ),
    }


def median_step(marks: list[float]) -> float:
    return statistics.median(after - before for before, after in itertools.pairwise(marks))


@contextmanager
def all_cores(wanted: bool) -> Iterator[None]:
    """Let torch use every core for a while: what runs on one rank has the machine to itself."""
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
