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

from nemo_star.kernels.te import TEKernel  # noqa: E402
from nemo_star.llm.front import LLM  # noqa: E402
from nemo_star.models import build as model_module  # noqa: E402
from nemo_star.parallel.groups import create_groups, initialize_alone  # noqa: E402
from nemo_star.parallel.layout import Layout  # noqa: E402


def recorded(calls):
    return sorted({(name, len(args), tuple(sorted(keywords))) for name, args, keywords in calls})


def run(checkpoint, implementation, decode_group=None, rotated_at_once=None):
    """Logits of a few steps over a context of several blocks with a small anchor; names of the layers' classes.

    Args:
        rotated_at_once: tokens of K that one call of the rotary kernel may have; None: as many as there are.
    """
    model_module.implementation_for = lambda device, dtype: implementation
    llm = LLM(checkpoint, attention={"block_size": 32, "anchor_size": 12})
    engine = llm.engine
    # The log-sum-exp within a window, which sinks need, is of torch's kernel for CUDA.
    if implementation == "transformer_engine" and not llm.description.model.attention_sinks:
        engine.state.kernel = engine.state.decode_kernel = TEKernel()
    engine.state.decode_group = decode_group
    if rotated_at_once is not None:
        config = llm.engine.stage.model.config
        width = (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels
        llm.engine.stage.rotary_pieces.limit = rotated_at_once * width
    context = engine.encode([i * i % 127 for i in range(100)])
    choose = lambda logits: (int(logits.argmax()), False)  # noqa: E731
    steps = engine.generate(context, [1, 2, 3], max_tokens=3, choose=choose)
    logits = [step.logits.tolist() for step in steps]
    return logits, sorted({type(module).__name__ for module in engine.stage.model.decoder.modules()})


def families(folders):
    """Of each checkpoint: the largest difference between both kinds of layers' logits."""
    differences = {}
    for folder in map(Path, folders):
        own, theirs = (torch.tensor(run(folder, name)[0]) for name in ("local", "transformer_engine"))
        differences[folder.name] = (own - theirs).abs().max().item()
    return differences


def main(checkpoint, *others):
    initialize_alone()
    groups = create_groups(Layout(tp=1, cp=1, dp=1, pp=1))
    own, own_classes = run(checkpoint, "local")
    CALLS.clear()
    theirs, their_classes = run(checkpoint, "transformer_engine")
    calls = list(CALLS)  # sharded decode is ours
    divided, _ = run(checkpoint, "transformer_engine", groups.collection.tp_cp)
    CALLS.clear()
    in_pieces, _ = run(checkpoint, "transformer_engine", rotated_at_once=9)
    pieces = [args[0].shape[0] for name, args, _ in CALLS if name == "apply_rotary_pos_emb"]
    report = {
        "found": FOUND.told(),
        "classes": [own_classes, their_classes],
        "calls": recorded(calls),
        "logits": [own, theirs, divided, in_pieces],
        "pieces": pieces,
        "families": families(others),
        "family_calls": recorded(CALLS),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
