"""Worker of test_fp8_cache.py: contexts in fp8 encoded, gone on, saved; questions on them answered together."""

import functools
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from nemo_star import LLM
from nemo_star.contexts.storage import save_context
from nemo_star.engine.engine import finished
from nemo_star.llm import opened
from nemo_star.parallel.groups import gather_objects


def together(engine, context, queries, steps):
    """Greedy tokens of all questions in one batch, and on rank 0 their logits [questions, steps, vocab]."""
    sequences, tokens, found = [engine.sequence(context) for _ in queries], queries, []
    for _ in range(steps):
        logits = engine.decode(list(zip(sequences, tokens, strict=True)))
        chosen = None if logits is None else [(token, False) for token in logits.argmax(-1).tolist()]
        tokens = [[token] for token, _ in engine.agree(chosen, len(queries))]
        found.append((tokens, logits))
    said = [[tokens[number][0] for tokens, _ in found] for number in range(len(queries))]
    return said, None if found[0][1] is None else torch.stack([logits for _, logits in found], dim=1)


def run(case):
    llm = LLM(case["checkpoint"], attention=case["attention"], parallel=case["parallel"], cache=case["cache"])
    engine, ask = llm.engine, functools.partial(together, queries=case["queries"], steps=case["steps"])
    context = engine.encode(case["ids"])
    save_context(engine, context, Path(case["folder"]), fingerprint="weights")
    size = max(gather_objects(context.cache.nbytes))
    at_once = ask(engine, context)
    finished(engine.extend(context, case["more"]))
    gone_on = ask(engine, context)
    llm.close()
    return size, at_once, gone_on


def main(requests, output):
    found, logits = [], {}
    opened.create_groups = functools.cache(opened.create_groups)
    for number, case in enumerate(json.loads(Path(requests).read_text())):
        size, *answers = run(case)
        found.append({"size": size, "tokens": [tokens for tokens, _ in answers]})
        logits |= {f"{number}/{turn}": rows.contiguous() for turn, (_, rows) in enumerate(answers) if rows is not None}
    if torch.distributed.get_rank() == 0:
        save_file(logits, f"{output}.logits")
        Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
