"""Worker of test_te_layers.py: one checkpoint in Megatron's own layers and in Transformer Engine's (a stand-in).

Run with tests/fake_transformer_engine on the path. Prints JSON: what was used and called, and the logits of both.
"""

import json
import sys
from pathlib import Path

import torch

from nemo_star.runtime.transformer_engine import find_transformer_engine

FOUND = find_transformer_engine()  # before Megatron is imported, as the tools do

from transformer_engine.pytorch.calls import CALLS  # noqa: E402

from nemo_star.checkpoint.description import read_description  # noqa: E402
from nemo_star.config.generate import GenerateConfig  # noqa: E402
from nemo_star.config.strict import parse  # noqa: E402
from nemo_star.kernels.te import TEKernel  # noqa: E402
from nemo_star.models import build as model_module  # noqa: E402
from nemo_star.parallel.groups import create_groups, initialize_alone  # noqa: E402
from nemo_star.parallel.layout import Layout  # noqa: E402
from nemo_star.serving.generate import build_engine  # noqa: E402


def run(checkpoint, implementation, groups, decode_group=None):
    """Logits of a few steps over a context of several blocks with a small anchor; names of the layers' classes."""
    model_module.implementation_for = lambda device, dtype: implementation
    attention = {"block_size": 32, "anchor_size": 12}
    config = parse(GenerateConfig, {"checkpoint": checkpoint, "context": "-", "query": "-", "attention": attention})
    engine = build_engine(config, read_description(Path(checkpoint)), groups, torch.device("cpu"))
    if implementation == "transformer_engine":
        engine.state.kernel = engine.state.decode_kernel = TEKernel()
    engine.state.decode_group = decode_group
    engine.encode_context([i * i % 251 for i in range(100)], new_tokens=10)
    choose = lambda logits: (int(logits.argmax()), False)  # noqa: E731
    logits = [step.logits.tolist() for step in engine.generate([1, 2, 3], tokens_to_generate=3, choose=choose)]
    return logits, sorted({type(module).__name__ for module in engine.stage.model.decoder.modules()})


def main(checkpoint):
    initialize_alone()
    groups = create_groups(Layout(tp=1, cp=1, dp=1, pp=1))
    own, own_classes = run(checkpoint, "local", groups)
    CALLS.clear()
    theirs, their_classes = run(checkpoint, "transformer_engine", groups)
    calls = list(CALLS)  # sharded decode is ours
    divided, _ = run(checkpoint, "transformer_engine", groups, groups.collection.tp_cp)
    report = {
        "found": FOUND.told(),
        "classes": [own_classes, their_classes],
        "calls": sorted({(name, len(args), tuple(sorted(keywords))) for name, args, keywords in calls}),
        "logits": [own, theirs, divided],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
