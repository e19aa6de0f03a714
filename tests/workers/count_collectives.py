"""Worker of test_collectives.py: counts the collectives over the cp group in prefill and in one decode step."""

import collections
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_star.checkpoint.description import read_description
from nemo_star.config.generate import GenerateConfig
from nemo_star.config.strict import parse
from nemo_star.parallel.groups import create_groups, initialize
from nemo_star.parallel.layout import plan_layout
from nemo_star.runtime.launch import run_as_tool
from nemo_star.serving.generate import build_engine

KINDS = ("all_", "broadcast", "gather", "reduce", "scatter", "barrier", "isend", "irecv", "send", "recv")
NAMES = [name for name in dir(dist) if name.startswith(KINDS) and callable(getattr(dist, name))]


def count(groups, work):
    """Names and numbers of the functions of torch.distributed that `work` calls on one of the groups."""
    seen = collections.Counter()
    originals = {name: getattr(dist, name) for name in NAMES}

    def wrapped(name):
        def call(*args, **kwargs):
            seen[name] += any(group is value for group in groups for value in (*args, *kwargs.values()))
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
    initialize()
    counts = {decode: count_phases(checkpoint, decode) for decode in ("replicated", "sharded")}
    if dist.get_rank() == 1:
        Path(output).write_text(json.dumps(counts))
    return 0


def count_phases(checkpoint, decode):
    sizes = {"attention": {"block_size": 32}, "parallel": {"decode": decode}}
    config = parse(GenerateConfig, {"checkpoint": checkpoint, "context": "-", "query": "-", **sizes})
    groups = create_groups(plan_layout(config.parallel, kind="star", world_size=2))
    over_cp = (groups.cp, groups.collection.tp_cp)
    engine = build_engine(config, read_description(Path(checkpoint)), groups, torch.device("cpu"))
    context = [i * i % 251 for i in range(100)]
    choose = lambda logits: (1, False)  # noqa: E731
    prefill = count(over_cp, lambda: engine.encode_context(context, new_tokens=10))
    steps = count(over_cp, lambda: list(engine.generate([1, 2, 3], tokens_to_generate=1, choose=choose)))
    return {"prefill": prefill, "decode": steps}


if __name__ == "__main__":
    run_as_tool(lambda: main(*sys.argv[1:]))
