"""The steps of `nemo-star gpu-check`, as data: name, command, limit, and what becomes of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_star.benchmarking.gpu_check.results import DECODE, KERNELS, MODELS, TESTS, TEXT, Result
from nemo_star.config.gpu_check import GpuCheckConfig
from nemo_star.runtime.locations import checkout

OUTPUT = "{output}"
"""In a command: the file that its rows go to."""


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    """What Python is given."""
    limit_seconds: float
    result: Result


def planned(config: GpuCheckConfig) -> list[Step]:
    """All steps, in the order in which they run: what others rest on first, what may take longest after that.

    Raises:
        ValueError: a step without a limit, or one that is asked for and unknown or impossible here.
    """
    declared = _declared(config)
    names = [name for name, _, _ in declared]
    for name in config.steps or ():
        if name not in names:
            raise ValueError(f"steps: {name!r} is unknown; known: {', '.join(names)}")
    for name in names:
        if name not in config.limits:
            raise ValueError(f"limits has none for step {name}: give +limits.{name}=SECONDS")
    if checkout() is None and "tests" in (config.steps or names):
        others = ",".join(name for name in names if name != "tests")
        raise ValueError(f"the tests are in a checkout, and nemo_star is installed without one: give steps=[{others}]")
    return [Step(name, tuple(command), config.limits[name], result) for name, command, result in declared]


def _declared(config: GpuCheckConfig) -> list[tuple[str, Sequence[str], Result]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]  # whatever else has a port
    benchmark = [*launcher, "-m", "nemo_star", "benchmark", *config.model]
    benchmark.append(f"attention.block_size={config.block_size}")
    kernels = ["-m", "nemo_star", "benchmark-kernels", f"--repeats={config.kernel_repeats}", f"--output={OUTPUT}"]
    listed = ["-v", "-o", "console_output_style=classic", "-p", "no:cacheprovider"]
    models = [
        (f"model_{tokens}", [*benchmark, *_prefill(config, tokens, *rest), f"output={OUTPUT}"], MODELS)
        for tokens, *rest in zip(config.context_tokens, config.repeats, config.layers, strict=True)
    ]
    return [
        ("doctor", ["-m", "nemo_star", "doctor"], TEXT),
        ("tests", ["-m", "pytest", *listed, *config.tests], TESTS),
        ("kernels", [*kernels, "--cached", "--blocks", *map(str, config.blocks)], KERNELS),
        *models,
        ("decode_kernels", [*kernels, "--blocks", "--cached", *map(str, config.cached)], KERNELS),
        ("decode_model", [*benchmark, *_decode(config), f"output={OUTPUT}"], DECODE),
    ]


def _prefill(config: GpuCheckConfig, tokens: int, repeats: int, layers: int) -> list[str]:
    words = ",".join(config.compare)
    sizes = [f"model.num_layers={layers}", f"context_tokens=[{tokens}]"]
    return [f"compare=[{words}]", *sizes, f"repeats={repeats}", "warm_up_rounds=0"]


def _decode(config: GpuCheckConfig) -> list[str]:
    """Rounds that warm up, so that the first that counts is alone in meeting its length for the first time."""
    lengths, words = ",".join(map(str, config.decode_context_tokens)), ",".join(config.decode_compare)
    return [
        f"model.num_layers={config.decode_layers}",
        f"compare=[{words}]",
        f"context_tokens=[{lengths}]",
        f"decode_tokens={config.decode_tokens}",
        "repeats=3",
        "warm_up_rounds=1",
    ]
