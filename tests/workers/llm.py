"""Worker of test_llm.py: a script that a user would write; every rank reports what it got."""

import json
import sys
from pathlib import Path

import torch

from nemo_star import LLM, SamplingParams
from nemo_star.parallel.groups import gather_objects


def plain(results):
    return [[result.text, result.token_ids, result.finish_reason] for result in results]


def bytes_of(context, llm):
    """K/V of a context on this rank."""
    return [x.clone() for number in llm.engine.stage.layer_numbers for x in context.cache.get(number) or ()]


def batch_of_two(llm, context, queries):
    """Logits of two sequences decoded in one step each time, and of the same two alone."""

    def steps(batch):
        sequences = [llm.engine.sequence(context.encoded) for _ in batch]
        logits = [llm.engine.decode(zip(sequences, batch, strict=True))]
        logits.append(llm.engine.decode([(sequence, [7]) for sequence in sequences]))
        return logits

    together, alone = steps(queries), [steps([query]) for query in queries]
    if together[0] is None:
        return 0.0
    return max(float((together[step][row] - alone[row][step][0]).abs().max()) for step in range(2) for row in range(2))


def main(checkpoint, requests, output):
    requests = json.loads(Path(requests).read_text())
    with LLM(checkpoint, attention={"block_size": 64}, parallel=requests["parallel"]) as llm:
        book = llm.encode(requests["context"])
        before = bytes_of(book, llm)
        params = SamplingParams(max_tokens=12)
        report = {
            "tokens": book.tokens,
            "answers": plain(llm.generate(book, requests["queries"], params)),
            "single": plain(llm.generate(book, requests["queries"][0], params)),
            "stopped": plain(llm.generate(book, requests["queries"][:1], SamplingParams(max_tokens=12, stop="."))),
        }
        sampled = SamplingParams(max_tokens=6, temperature=8.0, seed=5, n=3, logits=True)
        results = llm.generate(book, requests["queries"], sampled)
        report["samples"] = [plain(result.samples) for result in results]
        alone = llm.generate(book, requests["queries"][1], sampled)
        report["samples alone"] = plain(alone[0].samples)
        report["logits"] = [list(result.logits.shape) for result in results]
        report["error"] = ""
        try:
            llm.generate(book, [[1, 10**6]])
        except ValueError as error:
            report["error"] = str(error)
        ids = [llm._ids([("query", query)])[0] for query in requests["queries"][:2]]
        report["batch"] = batch_of_two(llm, book, ids)
        report["unchanged"] = all(torch.equal(*pair) for pair in zip(before, bytes_of(book, llm), strict=True))
        reports = gather_objects(report)
    if torch.distributed.get_rank() == 0:
        Path(output).write_text(json.dumps(reports))


if __name__ == "__main__":
    main(*sys.argv[1:])
