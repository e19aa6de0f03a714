"""Worker of test_step_graphs.py: decode steps on two ranks, plain and recorded, and Transformer Engine's layers (the
stand-in's) by torch's functions over tp. Prints JSON on rank 0: what each case differs by.

Run with tests/fake_transformer_engine on the path.
"""

import json
import sys

import torch.distributed as dist
from recorded import RecordedStep

from nemo_star.runtime.transformer_engine import find_transformer_engine

find_transformer_engine()  # before Megatron is imported, as the tools do

from nemo_star.engine.graphs import StepGraphs  # noqa: E402
from nemo_star.llm.front import LLM  # noqa: E402
from nemo_star.models import build as model_module  # noqa: E402
from nemo_star.models.torch_linears import TorchLinear, install_torch_linears  # noqa: E402

CONTEXT = [(7 * i * i + 3 * i) % 251 for i in range(128)]  # as many on each of two ranks: tokens are dealt by turns
STEPS = 12


def decoded(engine):
    """Of two queries that decode together: tokens [steps, 2], logits [steps, 2, vocab], kept on the first rank; and
    how many own tokens of each sequence every cp rank has at the end."""
    context = engine.encode(CONTEXT)
    sequences = [engine.sequence(context) for _ in range(2)]
    run, tokens, kept = [[3, 4, 5], [9]], [], []
    for _ in range(STEPS):
        logits = engine.decode(zip(sequences, run, strict=True))
        chosen = None if logits is None else [(token, False) for token in logits.argmax(-1).tolist()]
        agreed = [token for token, _ in engine.agree(chosen, 2)]
        tokens.append(agreed)
        kept += [] if logits is None else [logits]
        run = [[token] for token in agreed]
    return tokens, kept, [sequence.own_tokens_by_rank for sequence in sequences]


def case(checkpoint, name, implementation="local", **parallel):
    """How a step that is recorded, or whose linear layers are torch's, differs from the plain one."""
    model_module.implementation_for = lambda device, dtype: implementation
    llm = LLM(checkpoint, attention={"block_size": 32, "kernel": "cpu"}, parallel=parallel)
    engine = llm.engine
    expected_tokens, expected, held = decoded(engine)
    if implementation == "transformer_engine":
        install_torch_linears(engine.stage.model, engine.state)
    made = []

    def make():
        made.append(RecordedStep())
        return made[-1]

    engine.graphs = StepGraphs(engine, make)
    tokens, logits, held_too = decoded(engine)
    assert held_too == held
    return {
        "case": name,
        "same_tokens": tokens == expected_tokens,
        "difference": max((float((a - b).abs().max()) for a, b in zip(logits, expected, strict=True)), default=0.0),
        "replays": [step.replays for step in made],
        "own_tokens": held,
        "torch_linears": sum(isinstance(module, TorchLinear) for module in engine.stage.model.modules()),
        "summed": sum(
            getattr(module, "tp_group", None) is not None
            for module in engine.stage.model.modules()
            if isinstance(module, TorchLinear)
        ),
    }


def main(checkpoint):
    rows = [
        case(checkpoint, "cp", context_parallel_size=2, decode="replicated"),
        case(checkpoint, "cp sharded", context_parallel_size=2, decode="sharded"),
        case(checkpoint, "tp", tensor_model_parallel_size=2),
        case(checkpoint, "tp linears", "transformer_engine", tensor_model_parallel_size=2),
    ]
    if dist.get_rank() == 0:
        print(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
