"""Measure the attention kernels of this machine against torch's own: prefill TFLOP/s, decode bandwidth.

    python tools/benchmark_kernels.py [--blocks 8192 32768] [--cached 131072 1048576] [--output FILE.json]

A block is measured without an anchor, as block 0 runs, and with one of its own size, as the others do.
"""

import argparse
import json
from pathlib import Path

from nemo_star.config.llm import DTYPES
from nemo_star.runtime.files import check_target, write_whole
from nemo_star.runtime.launch import run_as_tool
from nemo_star.runtime.transformer_engine import prepare_imports


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--blocks", type=int, nargs="*", default=[8192, 32768], help="block sizes of prefill, in tokens"
    )
    parser.add_argument("--cached", type=int, nargs="*", default=[131072, 1048576], help="cached tokens of decode")
    parser.add_argument("--heads", type=int, default=32, help="query heads (Llama 3.1 8B: 32)")
    parser.add_argument("--groups", type=int, default=8, help="KV heads")
    parser.add_argument("--channels", type=int, default=128, help="head dimension")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on CPU")
    parser.add_argument("--repeats", type=int, default=20, help="rounds; medians are taken")
    parser.add_argument("--output", help="JSON file of rows")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    sizes = [*arguments.blocks, *arguments.cached, arguments.heads, arguments.groups, arguments.channels]
    if min(*sizes, arguments.repeats) < 1:
        raise ValueError("--blocks, --cached, --heads, --groups, --channels and --repeats must be at least 1")
    if arguments.heads % arguments.groups:
        raise ValueError(f"--heads {arguments.heads} is not divisible by --groups {arguments.groups}")
    check_target("--output", arguments.output, replace=arguments.overwrite, ways="--overwrite")
    prepare_imports()
    import torch

    from nemo_star.benchmarking.kernels import Shape, measure, table
    from nemo_star.runtime.machine import machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model = {"heads": arguments.heads, "groups": arguments.groups, "channels": arguments.channels}
    shapes = [
        Shape(phase="prefill", queries=block, keys=anchor + block, **model)
        for block in arguments.blocks
        for anchor in (0, block)
    ]
    shapes += [Shape(phase="decode", queries=1, keys=cached, **model) for cached in arguments.cached]
    rows = [
        {**row, **machine()}
        for shape in shapes
        for row in measure(shape, device=device, dtype=dtype, repeats=arguments.repeats)
    ]
    print(table(rows))
    if arguments.output:
        write_whole(Path(arguments.output), lambda file: file.write_text(json.dumps(rows, indent=2) + "\n"))
    return 0


if __name__ == "__main__":
    run_as_tool(main)
