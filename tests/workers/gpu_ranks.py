"""Worker of test_gpu.py: several ranks on one device, recorded cases at (tp, cp) layouts.

It makes the process group itself, with gloo, which has collectives for CUDA tensors: NCCL, which the tools take,
refuses two ranks on one device. gloo has no send and receive of CUDA tensors: ring and pipeline stages stay out.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from golden import CASES, FEW, GOLDEN
from safetensors.torch import load_file

from nemo_star.checkpoint.description import read_description
from nemo_star.config.llm import LLMConfig
from nemo_star.config.strict import parse
from nemo_star.engine.build import build_engine
from nemo_star.methods.registry import method_of
from nemo_star.parallel.groups import create_groups
from nemo_star.parallel.layout import plan_layout
from nemo_star.runtime.launch import run_as_tool


def run(checkpoint, case, kind, layout, device):
    """The row of one case at one layout; on rank 0."""
    tp, cp = layout
    star = {"block_size": case["block_size"]} if kind == "star" else {}
    if kind == "star" and case["anchor_block_size"] >= 0:
        star["anchor_size"] = case["anchor_block_size"]
    values = {
        "checkpoint": checkpoint,
        "dtype": "float32",
        "attention": {"kind": kind, "kernel": "math", **star},
        "parallel": {"tensor_model_parallel_size": tp, "context_parallel_size": cp},
    }
    config = parse(LLMConfig, values)
    groups = create_groups(plan_layout(config.parallel, method_of(config.attention), world_size=dist.get_world_size()))
    engine = build_engine(config, read_description(Path(checkpoint)), groups, device)
    tokens = case["max_new_tokens"]
    context = engine.encode(case["context_ids"])
    choose = lambda logits: (int(logits.argmax()), False)  # noqa: E731
    steps = list(engine.generate(context, case["query_ids"], max_tokens=tokens, choose=choose))
    if dist.get_rank() > 0:
        return None
    prefix = "fullctx_" if case["has_fullctx"] else ""
    expected = load_file(GOLDEN / "logits.safetensors")[f"{case['id']}/{prefix}logits"]
    logits = torch.stack([step.logits.cpu() for step in steps])
    return {
        "case": case["id"],
        "kind": kind,
        "tp": tp,
        "cp": cp,
        "device": engine.device.type,
        "same_tokens": [step.token for step in steps] == case[f"{prefix}generated_ids"],
        "difference": float((logits - expected).abs().max()),
    }


def main(checkpoint, output, layouts):
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("gloo")
    rows = []
    for layout in json.loads(layouts):
        cases = [(case, "star") for case in CASES if case["id"] in FEW]
        if layout[0] * layout[1] <= 2:  # two KV heads
            cases.append((next(case for case in CASES if case["attn"] == "ring"), "ulysses"))
        rows += [run(checkpoint, case, kind, layout, device) for case, kind in cases]
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    run_as_tool(lambda: main(*sys.argv[1:]))
