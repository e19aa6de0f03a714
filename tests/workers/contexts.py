"""Worker of test_contexts.py: contexts that go on, sequences that do; prints what differs from doing it at once."""

import json
import sys
from pathlib import Path

import torch

from nemo_star import LLM
from nemo_star.engine.engine import finished
from nemo_star.parallel.groups import gather_objects


def answer(engine, context, query, steps=4):
    """Logits [steps, vocab] on rank 0, greedy."""
    choose = lambda logits: (int(logits.argmax()), False)  # noqa: E731
    found = [step.logits for step in engine.generate(context, query, max_tokens=steps, choose=choose)]
    return torch.stack(found) if found[0] is not None else torch.zeros(steps, 1)


def difference(one, other):
    return float((one - other).abs().max())


def appended(engine, ids, query, ends):
    """The context in parts that end there, against the whole at the block size of the first."""
    context = engine.encode(ids[: ends[0]])
    settled, engine.method = engine.method, context.method
    whole = engine.encode(ids)
    engine.method = settled
    for start, stop in zip(ends, [*ends[1:], len(ids)], strict=True):
        finished(engine.extend(context, ids[start:stop]))
    assert context.tokens == len(ids)
    assert context.ids.tolist() == list(ids)
    held = gather_objects((engine.groups.cp.rank(), context.cache.tokens))
    assert sum(dict(held).values()) == len(ids)
    assert context.cache.tokens == context.partition.tokens_of(engine.groups.cp.rank())
    return difference(answer(engine, whole, query), answer(engine, context, query))


def turns(engine, ids, queries):
    """A sequence over two turns, forked and rolled back, against new ones."""
    context = engine.encode(ids)
    first, second = queries
    sequence = engine.sequence(context)
    engine.decode([(sequence, first)])
    forked = sequence.fork()
    after = engine.decode([(sequence, second)])
    once = engine.decode([(engine.sequence(context), first + second)])
    of_fork = engine.decode([(forked, second)])
    engine.decode([(sequence, [3])])
    engine.truncate(sequence, len(first))
    again = engine.decode([(sequence, second)])
    if after is None:
        return 0.0
    return max(difference(once, other) for other in (after, of_fork, again))


def main(folder, output):
    requests = json.loads((Path(folder) / "requests.json").read_text())
    found = {}
    for name, run in requests["runs"].items():
        llm = LLM(run["checkpoint"], attention=run["attention"], parallel=run["parallel"])
        differences = [appended(llm.engine, requests["ids"], requests["query"], ends) for ends in run["ends"]]
        differences.append(turns(llm.engine, requests["ids"], [requests["query"], requests["query"][::-1] * 2]))
        found[name] = max(differences)
        llm.close()
    if torch.distributed.get_rank() == 0:
        Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
