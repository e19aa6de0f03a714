"""Worker of test_collectives.py: counts the collectives over the cp group in prefill and in one decode step."""

import collections
import json
import sys
from pathlib import Path

import torch.distributed as dist

from nemo_star.llm.front import LLM
from nemo_star.parallel.groups import initialize
from nemo_star.runtime.launch import run_as_tool

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
    llm = LLM(checkpoint, attention={"block_size": 32}, parallel={"decode": decode})
    over_cp = (llm.groups.cp, llm.groups.collection.tp_cp)
    contexts = []
    prefill = count(over_cp, lambda: contexts.append(llm.engine.encode([i * i % 251 for i in range(100)])))
    choose = lambda logits: (1, False)  # noqa: E731
    steps = count(over_cp, lambda: list(llm.engine.generate(contexts[0], [1, 2, 3], max_tokens=1, choose=choose)))
    return {"prefill": prefill, "decode": steps}


if __name__ == "__main__":
    run_as_tool(lambda: main(*sys.argv[1:]))
