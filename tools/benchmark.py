"""Compare kinds of attention on random weights: prefill, decode, memory.

    torchrun --nproc-per-node N tools/benchmark.py [compare=[star:shared,star:recompute,ring,ulysses,dense]] \\
        [context_tokens=[4096,16384]] [model.num_layers=8 ...] [attention.block_size=2048] [output=FILE.json] [plot=DIR]
"""

import sys
from collections.abc import Sequence

from nemo_star.config.benchmark import BenchmarkConfig
from nemo_star.config.compose import compose
from nemo_star.runtime.launch import run_as_tool
from nemo_star.runtime.transformer_engine import prepare_imports


def main(arguments: Sequence[str]) -> int:
    config = compose(BenchmarkConfig, arguments, tool="benchmark", literal_keys=("output", "plot"))
    if config is None:
        return 0
    prepare_imports()
    from nemo_star.benchmarking.run import run  # only now: importing Megatron takes seconds

    return run(config)


if __name__ == "__main__":
    run_as_tool(lambda: main(sys.argv[1:]))
