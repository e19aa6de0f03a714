"""Worker of test_collectives.py: counts the collectives over the cp group in prefill and in one decode step."""

import collections
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_star.checkpoint.description import read_description
from nemo_star.config import GenerateConfig, parse
from nemo_star.distributed import create_groups, initialize
from nemo_star.generation import build_engine
from nemo_star.launch import run_as_tool
from nemo_star.shape import plan_layout

KINDS = ("all_", "broadcast", "gather", "reduce", "scatter", "barrier", "isend", "irecv", "send", "recv")
NAMES = [name for name in dir(dist) if name.startswith(KINDS) and callable(getattr(dist, name))]


def count(cp_group, work):
    """Names and numbers of the functions of torch.distributed that `work` calls on the cp group."""
    seen = collections.Counter()
    originals = {name: getattr(dist, name) for name in NAMES}

    def wrapped(name):
        def call(*args, **kwargs):
            seen[name] += cp_group in (*args, *kwargs.values())
            return originals[name](*args, **kwargs)

        return call

    for name in NAMES:
        setattr(dist, name, wrapped(name))
    try:
        work()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return {name: number for name, number in seen.items() if number}


def main(checkpoint, output):
    values = {"checkpoint": checkpoint, "context": "-", "query": "-", "attention": {"block_size": 32}}
    config = parse(GenerateConfig, values)
    initialize(timeout_minutes=5)
    groups = create_groups(plan_layout(config.parallel, kind="star", world_size=2), timeout_minutes=5)
    engine = build_engine(config, read_description(Path(checkpoint)), groups, torch.device("cpu"))
    context = [i * i % 251 for i in range(100)]
    choose = lambda logits: (1, False)  # noqa: E731
    prefill = count(groups.cp, lambda: engine.encode_context(context, new_tokens=10))
    decode = count(groups.cp, lambda: list(engine.generate([1, 2, 3], tokens_to_generate=1, choose=choose)))
    if dist.get_rank() == 1:
        Path(output).write_text(json.dumps({"prefill": prefill, "decode": decode}))
    return 0


if __name__ == "__main__":
    run_as_tool(lambda: main(*sys.argv[1:]))
