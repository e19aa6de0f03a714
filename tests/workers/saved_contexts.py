"""Worker of test_saved_contexts.py: saves contexts, loads them at this layout, kills itself while saving, walks."""

import functools
import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from store_walk import walk

from nemo_star import LLM
from nemo_star.contexts import files, index
from nemo_star.contexts.storage import load_context, save_context
from nemo_star.engine.engine import finished
from nemo_star.llm import opened
from nemo_star.parallel.groups import gather_objects

QUERY = [7, 20, 33, 9]


def answer(engine, context, steps=6):
    """Greedy tokens, and on rank 0 their logits [steps, vocab]."""
    choose = lambda logits: (int(logits.argmax()), False)  # noqa: E731
    found = list(engine.generate(context, QUERY, max_tokens=steps, choose=choose))
    logits = torch.zeros(1) if found[0].logits is None else torch.stack([step.logits for step in found])
    return [step.token for step in found], logits


def answers(engine, context, more):
    """Of a context, and of the same when it has gone on."""
    before = answer(engine, context)
    finished(engine.extend(context, more))
    return before, answer(engine, context)


def kv(engine, context):
    return [x.clone() for number in engine.stage.layer_numbers for x in context.cache.get(number) or ()]


def save(engine, case):
    """Encode, in parts that end at `ends`, save, and load; answers of what was saved, and of what was loaded."""
    ids, ends, folder = case["ids"], case["ends"], Path(case["folder"])
    context = engine.encode(ids[: ends[0]])
    for start, stop in pairwise(ends):
        finished(engine.extend(context, ids[start:stop]))
    save_context(engine, context, folder, fingerprint="weights")
    loaded = load_context(engine, folder, fingerprint="weights")
    if loaded.partition.tokens_by_rank == context.partition.tokens_by_rank and len(ends) == 1:
        pairs = zip(kv(engine, context), kv(engine, loaded), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), "K/V differ at the same layout"
    assert loaded.ids.tolist() == context.ids.tolist() == ids
    return {"saved": answers(engine, context, case["more"]), "loaded": answers(engine, loaded, case["more"])}


def load(engine, case):
    loaded = load_context(engine, Path(case["folder"]), fingerprint="weights", verify=True)
    assert loaded.ids.tolist() == case["ids"]
    held = gather_objects((engine.groups.cp.rank(), loaded.cache.tokens), engine.groups.replica)
    assert sum(dict(held).values()) == len(case["ids"])
    return {"loaded": answers(engine, loaded, case["more"])}


def refuse(engine, case):
    """The message, which must be the same on all ranks."""
    try:
        load_context(engine, Path(case["folder"]), fingerprint=case.get("fingerprint", "weights"))
    except ValueError as error:
        (message,) = set(gather_objects(str(error)))
        return message
    return "not refused"


def kill(engine, case):
    """Save the second half over the first, and die on one rank: in the middle of its file, or of the index."""
    folder, ids = Path(case["folder"]), case["ids"]
    save_context(engine, engine.encode(ids[:50]), folder, fingerprint="weights")

    def dies(file, tensors):
        file.write_bytes(b"half")
        os._exit(9)

    def dies_dumping(values, output, **_):
        output.write('{"format_version": 1,')
        output.flush()
        os._exit(9)

    if torch.distributed.get_rank() == case["rank"]:
        if case["at"] == "file":
            files.write_tensors = dies
        else:
            index.json.dump = dies_dumping
    save_context(engine, engine.encode(ids[50:]), folder, fingerprint="weights")


def walked(engine, case):
    worst, encoded = walk(engine, Path(case["folder"]) if case["folder"] else None)
    assert len(set(gather_objects(encoded))) == 1
    return max(gather_objects(worst)), encoded


def main(requests, output):
    found, logits = [], {}
    # Process groups stay until the end, and each has threads of its own: one set to a layout.
    opened.create_groups = functools.cache(opened.create_groups)
    for number, run in enumerate(json.loads(Path(requests).read_text())):
        llm = LLM(run["checkpoint"], attention=run["attention"], parallel=run["parallel"])
        result = globals()[run["do"]](llm.engine, run)
        if isinstance(result, dict):
            for name, pair in result.items():
                for when, (_, rows) in zip(("at once", "gone on"), pair, strict=True):
                    logits[f"{number}/{name}/{when}"] = rows.contiguous()
            result = {name: [tokens for tokens, _ in pair] for name, pair in result.items()}
        found.append(result)
        llm.close()
    if torch.distributed.get_rank() == 0:
        save_file(logits, f"{output}.logits")
        Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
