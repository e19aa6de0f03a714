"""Recorded cases of the published reference as runs of tools/generate.py, and the check of their answers."""

import itertools
import json
from pathlib import Path

import torch
from launch import generate_many, read_jsonl, write_jsonl
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parent.parent / "data" / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
FEW = (
    "tiny-a-star-w1-c100-q16-b32-a8",
    "tiny-a-star-w2-c150-q9-b32-a12",
    "tiny-a-star-w2-c32-q1-b32-afull",
    "tiny-a-star-w3-c77-q1-b16-afull",
)
"""Cases that run at every layout also when time is short: a small anchor, short blocks, ranks without a block."""
TOLERANCE = 5e-4
MAX_TOKENS = max(case["max_new_tokens"] for case in CASES)
"""All cases generate so many, that more of them share a run; what was recorded is their beginning."""


def settings(case, layout=(1, None, 1), **changes):
    """Overrides that make a run of this case, or of a changed one, at a layout."""
    case = {**case, **changes}
    tp, cp, pp = layout
    overrides = [
        f"attention={case['attn']}",
        f"inference.tokens_to_generate={MAX_TOKENS}",
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.pipeline_model_parallel_size={pp}",
    ]
    if case["attn"] == "star":
        overrides += [f"attention.block_size={case['block_size']}", f"attention.anchor={case.get('anchor', 'shared')}"]
        if case["anchor_block_size"] >= 0:
            overrides.append(f"attention.anchor_size={case['anchor_block_size']}")
    if cp is not None:
        overrides.append(f"parallel.context_parallel_size={cp}")
    return overrides


def run_cases(processes, labelled, checkpoint, folder, **options):
    """Run [(label, overrides, case)] in one launch, cases of like overrides in one file -> {label: (line, logits)}.

    Options as for `launch.torchrun`.
    """
    runs, files = [], []
    grouped = itertools.groupby(sorted(labelled, key=lambda item: item[1]), key=lambda item: item[1])
    for number, (overrides, items) in enumerate(grouped):
        rows = [
            {"id": label, "context_ids": case["context_ids"], "query_ids": case["query_ids"]}
            for label, _, case in items
        ]
        source = write_jsonl(folder / f"{processes}-{number}.in.jsonl", rows)
        out, logits = folder / f"{processes}-{number}.jsonl", folder / f"{processes}-{number}.safetensors"
        paths = [f"checkpoint={checkpoint}", f"input={source}", f"output={out}", f"output_logits={logits}"]
        runs.append([*paths, *overrides, "inference.ignore_eos=true"])
        files.append((out, logits))
    results = generate_many(processes, runs, folder, **options)
    assert [result["code"] for result in results] == [0] * len(runs), results
    answers = {}
    for out, logits_file in files:
        logits = load_file(logits_file)
        answers.update({line["id"]: (line, logits[f"{line['id']}/logits"]) for line in read_jsonl(out)})
    return answers


def check(answer, case, golden_logits):
    line, logits = answer
    # With several ranks and query tokens the reference masks keys that the paper shows the query: `fullctx` does not.
    prefix = "fullctx_" if case["has_fullctx"] else ""
    expected = golden_logits[f"{case['id']}/{prefix}logits"]
    tokens = case["max_new_tokens"]
    assert line["token_ids"][:tokens] == case[f"{prefix}generated_ids"]
    assert logits.dtype == torch.float32
    assert (logits[:tokens] - expected).abs().max() <= TOLERANCE
    assert sum(line["stats"]["kv_tokens_per_cp_rank"]) == len(case["context_ids"]) == line["context_tokens"]
    assert line["query_tokens"] == len(case["query_ids"])
    assert line["text"] is None
    assert line["finish_reason"] == "length"
