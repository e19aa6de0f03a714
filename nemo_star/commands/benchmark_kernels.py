"""Measure the attention kernels of this machine against torch's own: prefill TFLOP/s, decode bandwidth, and the
merge of partial results.

    %(prog)s [--blocks 8192 32768] [--cached 131072 1048576] [--partials 2 16] [--output FILE.json]

A block is measured without an anchor, as block 0 runs, and with one of its own size, as the others do.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_star.commands.arguments import parser
from nemo_star.config.llm import DTYPES
from nemo_star.runtime.files import check_target, write_whole
from nemo_star.runtime.transformer_engine import prepare_imports


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    command = parser("benchmark-kernels", __doc__)
    add = command.add_argument
    add("--blocks", type=int, nargs="*", default=[8192, 32768], help="block sizes of prefill, in tokens")
    add("--cached", type=int, nargs="*", default=[131072, 1048576], help="cached tokens of decode")
    add("--partials", type=int, nargs="*", default=[2, 16], help="partial results of a token: 2 of each cp rank")
    add("--heads", type=int, default=32, help="query heads (Llama 3.1 8B: 32)")
    add("--groups", type=int, default=8, help="KV heads")
    add("--channels", type=int, default=128, help="head dimension")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on CPU")
    add("--repeats", type=int, default=20, help="rounds; medians are taken")
    add("--output", help="JSON file of rows")
    add("--overwrite", action="store_true")
    given = command.parse_args(arguments)
    sizes = [*given.blocks, *given.cached, *given.partials, given.heads, given.groups, given.channels]
    if min(*sizes, given.repeats) < 1:
        raise ValueError(
            "--blocks, --cached, --partials, --heads, --groups, --channels and --repeats must be at least 1"
        )
    if given.heads % given.groups:
        raise ValueError(f"--heads {given.heads} is not divisible by --groups {given.groups}")
    return given


def main(arguments: Sequence[str]) -> int:
    """Exit code 0. Raises ValueError for a user's error."""
    given = parse_arguments(arguments)
    check_target("--output", given.output, replace=given.overwrite, ways="--overwrite")
    prepare_imports()
    import torch

    from nemo_star.benchmarking.kernels import Shape, measure, table
    from nemo_star.runtime.machine import machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model = {"heads": given.heads, "groups": given.groups, "channels": given.channels}
    shapes = [
        Shape(phase="prefill", queries=block, keys=anchor + block, **model)
        for block in given.blocks
        for anchor in (0, block)
    ]
    shapes += [Shape(phase="decode", queries=1, keys=cached, **model) for cached in given.cached]
    shapes += [Shape(phase="merge", queries=1, keys=partials, **model) for partials in given.partials]
    rows: list[dict[str, Any]] = []
    for shape in shapes:  # what comes early outlives what dies later
        new = [{**row, **machine()} for row in measure(shape, device=device, dtype=dtype, repeats=given.repeats)]
        print(table(new, titles=not rows), flush=True)
        rows += new
        if given.output:
            text = json.dumps(rows, indent=2) + "\n"
            write_whole(Path(given.output), functools.partial(Path.write_text, data=text))
    return 0
