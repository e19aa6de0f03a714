"""Worker of test_triton.py: the cases of tests/support/triton_cases.py, and a model, in Triton's interpreter on CPU.

Prints JSON: by case, what went wrong, or ""; the model's logits by torch and by Triton.
"""

import json
import os
import sys
import traceback

os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are made, Triton's own ones among them

import torch
from triton_cases import CASES

from nemo_star import LLM
from nemo_star.kernels.merge import merge_by_triton
from nemo_star.kernels.triton_kernel import TritonKernel

IN_16_BITS = ("five tokens", "e4m3", "merge of 2", "merge of 5")
"""Cases that are run in float16, too. The interpreter's matrix product takes bfloat16's bits for numbers."""


def outcome(case, dtype):
    try:
        case(torch.device("cpu"), dtype)
    except Exception:
        return traceback.format_exc()
    return ""


def logits(engine):
    context = engine.encode([i * i % 127 for i in range(70)])
    choose = lambda logits: (int(logits.argmax()), False)  # noqa: E731
    return [step.logits.tolist() for step in engine.generate(context, [1, 2, 3], max_tokens=3, choose=choose)]


def main(checkpoint):
    report = {name: outcome(case, torch.float32) for name, case in CASES.items()}
    for name, case in CASES.items():
        if name.startswith(IN_16_BITS):
            report[name] += outcome(case, torch.float16)
    engine = LLM(checkpoint, attention={"block_size": 32, "anchor_size": 12}).engine
    by_torch = logits(engine)
    engine.state.decode_kernel, engine.state.merge = TritonKernel(programs=4), merge_by_triton
    print(json.dumps({"cases": report, "logits": [by_torch, logits(engine)]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
