"""tools/generate.py against recorded outputs of the published reference, at its layouts and at others."""

import itertools
import json

import pytest
import torch
from conftest import GOLDEN
from launch import generate_many, read_jsonl, write_jsonl
from safetensors.torch import load_file

CASES = json.loads((GOLDEN / "cases.json").read_text())
STAR = [case for case in CASES if case["attn"] == "star"]
DENSE = [case for case in CASES if case["attn"] == "dense"]
TOLERANCE = 5e-4


def settings(case):
    """Overrides that make a run of this case."""
    overrides = [f"attention={case['attn']}", f"inference.tokens_to_generate={case['max_new_tokens']}"]
    if case["attn"] == "star":
        overrides.append(f"attention.block_size={case['block_size']}")
        if case["anchor_block_size"] >= 0:
            overrides.append(f"attention.anchor_size={case['anchor_block_size']}")
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


@pytest.fixture(scope="module")
def answers(tiny, tmp_path_factory):
    """Every star case at its own world size, at 1 and at 4 ranks; every dense case, dense and as star of one block."""
    plan = {processes: [] for processes in (1, 2, 3, 4)}
    for case in STAR:
        for processes in {case["world_size"], 1, 4}:
            plan[processes].append((f"{case['id']}@{processes}", settings(case), case))
    for case in DENSE:
        plan[1].append((case["id"], settings(case), case))
        one_block = {**case, "attn": "star", "block_size": 512, "anchor_block_size": -1}
        plan[2].append((f"{case['id']}@one-block", settings(one_block), case))
    found = {}
    for processes, labelled in plan.items():
        found.update(run_cases(processes, labelled, tiny, tmp_path_factory.mktemp("golden")))
    return found


def check(answer, case, golden_logits):
    line, logits = answer
    # With several ranks and query tokens the reference masks keys that the paper shows the query: `fullctx` does not.
    prefix = "fullctx_" if case["has_fullctx"] else ""
    expected = golden_logits[f"{case['id']}/{prefix}logits"]
    assert line["token_ids"] == case[f"{prefix}generated_ids"]
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= TOLERANCE
    assert sum(line["stats"]["kv_tokens_per_cp_rank"]) == len(case["context_ids"]) == line["context_tokens"]
    assert line["query_tokens"] == len(case["query_ids"])
    assert line["text"] is None
    assert line["finish_reason"] == "length"


@pytest.mark.parametrize("case", STAR, ids=lambda case: case["id"])
@pytest.mark.parametrize("layout", ["own", "1", "4"])
def test_star_gives_the_recorded_answer_at_any_number_of_ranks(answers, golden_logits, case, layout):
    processes = case["world_size"] if layout == "own" else layout
    check(answers[f"{case['id']}@{processes}"], case, golden_logits)


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case["id"])
def test_dense_gives_the_recorded_answer(answers, golden_logits, case):
    check(answers[case["id"]], case, golden_logits)


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case["id"])
def test_star_of_one_block_is_dense(answers, golden_logits, case):
    check(answers[f"{case['id']}@one-block"], case, golden_logits)


def test_a_rank_without_a_block_takes_part(answers):
    line, _ = answers["tiny-a-star-w2-c32-q1-b32-afull@4"]
    assert line["stats"]["kv_tokens_per_cp_rank"] == [32, 0, 0, 0]
