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

from nemo_star.attention.step import DecodeStep  # noqa: E402
from nemo_star.kernels.te import TEKernel  # noqa: E402
from nemo_star.llm.front import LLM  # noqa: E402
from nemo_star.models import build as model_module  # noqa: E402
from nemo_star.models.torch_linears import install_torch_linears  # noqa: E402
from nemo_star.parallel.groups import create_groups, initialize_alone  # noqa: E402
from nemo_star.parallel.layout import Layout  # noqa: E402


def recorded(calls):
    return sorted({(name, len(args), tuple(sorted(keywords))) for name, args, keywords in calls})


def decode_calls(model, state):
    """A list that grows by the class of each of Transformer Engine's modules that is called in decode."""
    called = []

    def note(module, *_):
        if isinstance(state.step, DecodeStep):
            called.append(type(module).__name__)

    for module in model.modules():
        if any(base.__module__.startswith("transformer_engine") for base in type(module).__mro__):
            module.register_forward_hook(note)
    return called


def open_engine(checkpoint, implementation):
    model_module.implementation_for = lambda device, dtype: implementation
    llm = LLM(checkpoint, attention={"block_size": 32, "anchor_size": 12})
    # The log-sum-exp within a window, which sinks need, is of torch's kernel for CUDA.
    if implementation == "transformer_engine" and not llm.description.model.attention_sinks:
        llm.engine.state.kernel = llm.engine.state.decode_kernel = TEKernel()
    return llm.engine


def logits_of(engine, context):
    """Of a few steps."""
    choose = lambda logits: (int(logits.argmax()), False)  # noqa: E731
    steps = engine.generate(context, [1, 2, 3], max_tokens=3, choose=choose)
    return [step.logits.tolist() for step in steps]


def encoded(engine):
    """A context of several blocks with a small anchor."""
    return engine.encode([i * i % 127 for i in range(100)])


def run(checkpoint, implementation, decode_group=None, rotated_at_once=None):
    """Logits of a few steps; names of the layers' classes, and of Transformer Engine's that decode called.

    Args:
        rotated_at_once: tokens of K that one call of the rotary kernel may have; None: as many as there are.
    """
    engine = open_engine(checkpoint, implementation)
    engine.state.decode_group = decode_group
    called = decode_calls(engine.stage.model, engine.state)
    if rotated_at_once is not None:
        config = engine.stage.model.config
        width = (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels
        engine.stage.rotary_pieces.limit = rotated_at_once * width
    logits = logits_of(engine, encoded(engine))
    return logits, sorted({type(module).__name__ for module in engine.stage.model.decoder.modules()}), called


def families(folders):
    """Of each checkpoint: the largest differences between the logits of Megatron's own layers and those of Transformer
    Engine's, without and with torch's functions in decode; and what of Transformer Engine decode still called then."""
    differences = {}
    for folder in map(Path, folders):
        own = torch.tensor(run(folder, "local")[0])
        engine = open_engine(folder, "transformer_engine")
        context = encoded(engine)
        theirs = logits_of(engine, context)
        called = decode_calls(engine.stage.model, engine.state)
        install_torch_linears(engine.stage.model, engine.state)
        pair = [(own - torch.tensor(logits)).abs().max().item() for logits in (theirs, logits_of(engine, context))]
        differences[folder.name] = [*pair, called]
    return differences


def main(checkpoint, *others):
    initialize_alone()
    groups = create_groups(Layout(tp=1, cp=1, dp=1, pp=1))
    own, own_classes, _ = run(checkpoint, "local")
    CALLS.clear()
    theirs, their_classes, called = run(checkpoint, "transformer_engine")
    calls = list(CALLS)  # sharded decode is ours
    divided, *_ = run(checkpoint, "transformer_engine", groups.collection.tp_cp)
    CALLS.clear()
    in_pieces, *_ = run(checkpoint, "transformer_engine", rotated_at_once=9)
    pieces = [args[0].shape[0] for name, args, _ in CALLS if name == "apply_rotary_pos_emb"]
    report = {
        "found": FOUND.told(),
        "classes": [own_classes, their_classes],
        "called in decode": sorted(set(called)),
        "calls": recorded(calls),
        "logits": [own, theirs, divided, in_pieces],
        "pieces": pieces,
        "families": families(others),
        "family_calls": recorded(CALLS),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
