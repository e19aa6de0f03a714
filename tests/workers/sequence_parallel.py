"""Worker of test_sequence_parallel.py: the same request with and without sequence parallelism, at tp 2 and pp 2.

The tools refuse it on CPU, because Megatron's exchanges allocate their results on the current CUDA device. Here that
device is said to be the CPU; the exchanges themselves are gloo's.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_star.checkpoint.description import read_description
from nemo_star.config.llm import LLMConfig
from nemo_star.config.strict import parse
from nemo_star.engine.build import build_engine
from nemo_star.parallel.groups import create_groups, gather_objects, initialize
from nemo_star.parallel.layout import plan_layout
from nemo_star.runtime.launch import run_as_tool


def run(checkpoint, block_size, sequence_parallel, dtype="float32"):
    """(K/V cached by this rank's first layer, logits on the first rank, lengths of hidden states before the layers)."""
    parallel = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": sequence_parallel,
    }
    values = {
        "checkpoint": checkpoint,
        "dtype": dtype,
        "attention": {"block_size": block_size},
        "parallel": parallel,
    }
    config = parse(LLMConfig, values)
    groups = create_groups(plan_layout(config.parallel, None, world_size=4))
    engine = build_engine(config, read_description(Path(checkpoint)), groups, torch.device("cpu"))
    lengths = []
    first_layer = engine.stage.model.decoder.layers[0]
    first_layer.register_forward_pre_hook(
        lambda module, args, keywords: lengths.append((*args, *keywords.values())[0].shape[0]), with_kwargs=True
    )
    context = engine.encode([i * i % 251 for i in range(100)])
    cached = [x.clone() for x in context.cache.get(engine.stage.layer_numbers[-1])]
    choose = lambda logits: (int(logits.argmax()), False)  # noqa: E731
    steps = list(engine.generate(context, [1, 2, 3], max_tokens=2, choose=choose))
    logits = [step.logits for step in steps if step.logits is not None]
    return cached, logits, lengths


def main(checkpoint, output):
    initialize()
    torch.cuda.current_device = lambda: torch.device("cpu")
    report = {}
    for block_size in (32, 33):
        (cached, logits, lengths), (same_cached, same_logits, divided) = (
            run(checkpoint, block_size, wanted) for wanted in (False, True)
        )
        differences = [
            float((a - b).abs().max()) for a, b in zip(cached + logits, same_cached + same_logits, strict=True)
        ]
        report[block_size] = {
            "difference": max(gather_objects(max(differences))),
            "lengths": gather_objects(lengths),
            "divided": gather_objects(divided),
        }
    (cached, _, _), (same_cached, _, _) = (run(checkpoint, 32, wanted, "bfloat16") for wanted in (False, True))
    report["bfloat16"] = {
        "types": sorted({str(x.dtype) for row in gather_objects(cached) for x in row}),
        "difference": max(
            gather_objects(max(float((a - b).abs().max()) for a, b in zip(cached, same_cached, strict=True)))
        ),
    }
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    run_as_tool(lambda: main(*sys.argv[1:]))
