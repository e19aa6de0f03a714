"""tools/generate.py against recorded outputs of the published reference, at its layouts and at others."""

import itertools
import json
import math

import pytest
import torch
from conftest import GOLDEN
from launch import generate_many, read_jsonl, write_jsonl
from safetensors.torch import load_file

CASES = json.loads((GOLDEN / "cases.json").read_text())
STAR, DENSE, RING = ([case for case in CASES if case["attn"] == kind] for kind in ("star", "dense", "ring"))
LAYOUTS = {
    1: [(1, 1, 1)],
    2: [(1, 1, 2)],
    3: [(1, 1, 3)],
    4: [(1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 1)],
    8: [(2, 2, 2)],
}
"""World size -> (tp, pp, cp) to run on it."""
EVERYWHERE = [layout for layouts in LAYOUTS.values() for layout in layouts]
TOLERANCE = 5e-4
MOST_TOKENS = max(case["max_new_tokens"] for case in CASES)
"""All cases generate so many, that more of them share a run; what was recorded is their beginning."""


def settings(case, layout=(1, 1, None), **changes):
    """Overrides that make a run of this case, or of a changed one, at a layout."""
    case = {**case, **changes}
    tp, pp, cp = layout
    overrides = [
        f"attention={case['attn']}",
        f"inference.tokens_to_generate={MOST_TOKENS}",
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


def run_cases(processes, labelled, checkpoint, folder):
    """Run [(label, overrides, case)] in one launch, cases of like overrides in one file -> {label: (line, logits)}."""
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
    results = generate_many(processes, runs, folder)
    assert [result["code"] for result in results] == [0] * len(runs), results
    answers = {}
    for out, logits_file in files:
        logits = load_file(logits_file)
        answers.update({line["id"]: (line, logits[f"{line['id']}/logits"]) for line in read_jsonl(out)})
    return answers


def name(case, layout, variant):
    return f"{case['id']}@{'x'.join(map(str, layout))}:{variant}"


def plan(processes):
    """What to run on so many processes: [(label, overrides, case)]."""
    runs = []
    for layout in LAYOUTS[processes]:
        cp = layout[2]
        runs += [
            (name(case, layout, anchor), settings(case, layout, anchor=anchor), case)
            for case in STAR
            for anchor in ("shared", "recompute")
            if layout != (1, 1, 3) or case["world_size"] == 3
        ]
        runs += [(name(case, layout, "ring"), settings(case, layout), case) for case in RING]
        if cp in (1, 2) and layout[0] * cp <= 4:
            runs += [(name(case, layout, "ulysses"), settings(case, layout, attn="ulysses"), case) for case in RING]
        if cp == 1:
            runs += [(name(case, layout, "dense"), settings(case, layout), case) for case in DENSE]
        if layout == (1, 1, 2):
            one = {"attn": "star", "block_size": 512, "anchor_block_size": -1}
            runs += [(name(case, layout, "one-block"), settings(case, layout, **one), case) for case in DENSE]
    return runs


@pytest.fixture(scope="module")
def answers(tiny, tmp_path_factory):
    """Everything, one launch for each number of processes."""
    found = {}
    for processes in LAYOUTS:
        found.update(run_cases(processes, plan(processes), tiny, tmp_path_factory.mktemp("golden")))
    return found


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


def identify(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


@pytest.mark.parametrize("layout", EVERYWHERE, ids=identify)
def test_recorded_answers_at_every_layout(answers, golden_logits, layout):
    """Star with shared and recomputed anchors, ring, Ulysses and dense: whatever was run at this layout."""
    here = name({"id": ""}, layout, "")
    runs = [(label, case) for label, _, case in plan(math.prod(layout)) if here in label]
    assert len(runs) >= 5
    for label, case in runs:
        check(answers[label], case, golden_logits)


@pytest.mark.parametrize("case", STAR, ids=lambda case: case["id"])
def test_star_at_its_own_number_of_ranks(answers, golden_logits, case):
    for anchor in ("shared", "recompute"):
        check(answers[name(case, (1, 1, case["world_size"]), anchor)], case, golden_logits)


def test_a_rank_without_a_block_takes_part(answers):
    case = next(case for case in STAR if case["id"] == "tiny-a-star-w2-c32-q1-b32-afull")
    line, _ = answers[name(case, (1, 1, 4), "shared")]
    assert line["stats"]["kv_tokens_per_cp_rank"] == [32, 0, 0, 0]
