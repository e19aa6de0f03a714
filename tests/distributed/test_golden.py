"""tools/generate.py against recorded outputs of the published reference, at its layouts and at others."""

import math

import pytest
from golden import CASES, FEW, check, run_cases, settings

STAR, DENSE, RING = ([case for case in CASES if case["attn"] == kind] for kind in ("star", "dense", "ring"))
LAYOUTS = {
    1: [(1, 1, 1)],
    2: [(1, 2, 1)],
    3: [(1, 3, 1)],
    4: [(1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)],
    8: [(2, 2, 2)],
}
"""World size -> (tp, cp, pp) to run on it."""
QUICK_SIZES = (1, 2, 3, 4)


def name(case, layout, variant):
    return f"{case['id']}@{'x'.join(map(str, layout))}:{variant}"


def plan(processes, everything):
    """What to run on so many processes: [(label, overrides, case)]; all cases, or each at its own size and a few."""
    runs = []
    for layout in LAYOUTS[processes]:
        cp = layout[1]
        own = [case for case in STAR if layout == (1, case["world_size"], 1)]
        for anchor in ("shared", "recompute"):
            ids = FEW if layout == (1, cp, 1) else FEW[1:3]
            few = [case for case in STAR if case["id"] in ids and case not in own] if anchor == "shared" else []
            all_cases = everything or (layout == (1, 1, 1) and anchor == "shared")
            cases = STAR if all_cases else own + few
            runs += [(name(case, layout, anchor), settings(case, layout, anchor=anchor), case) for case in cases]
        if cp > 1:
            cases = [case for case in STAR if everything or case["id"] in FEW[1:3]]
            sharded = ["parallel.decode=sharded"]
            runs += [(name(case, layout, "sharded"), settings(case, layout) + sharded, case) for case in cases]
        exact = RING if everything else RING[-2:]
        runs += [(name(case, layout, "ring"), settings(case, layout), case) for case in exact]
        if layout[0] * cp <= 2:  # two KV heads
            runs += [(name(case, layout, "ulysses"), settings(case, layout, attn="ulysses"), case) for case in exact]
        if cp == 1:
            dense = DENSE if everything or layout == (1, 1, 1) else DENSE[:1]
            runs += [(name(case, layout, "dense"), settings(case, layout), case) for case in dense]
        if layout == (1, 2, 1):
            one = {"attn": "star", "block_size": 512, "anchor_block_size": -1}
            runs += [(name(case, layout, "one-block"), settings(case, layout, **one), case) for case in DENSE]
    return runs


def run_plans(sizes, everything, checkpoint, tmp_path_factory):
    """Answers by label, one launch for each number of processes."""
    found = {}
    for processes in sizes:
        found.update(run_cases(processes, plan(processes, everything), checkpoint, tmp_path_factory.mktemp("golden")))
    return found


@pytest.fixture(scope="module")
def answers(tiny, tmp_path_factory):
    return run_plans(QUICK_SIZES, False, tiny, tmp_path_factory)


@pytest.fixture(scope="module")
def all_answers(tiny, tmp_path_factory):
    return run_plans(LAYOUTS, True, tiny, tmp_path_factory)


def identify(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


def check_layout(answers, golden_logits, layout, everything):
    """Star with shared and recomputed anchors, ring, Ulysses and dense: whatever was run at this layout."""
    here = name({"id": ""}, layout, "")
    runs = [(label, case) for label, _, case in plan(math.prod(layout), everything) if here in label]
    assert len(runs) >= 5
    for label, case in runs:
        check(answers[label], case, golden_logits)


@pytest.mark.parametrize("layout", [layout for size in QUICK_SIZES for layout in LAYOUTS[size]], ids=identify)
def test_recorded_answers_at_a_layout(answers, golden_logits, layout):
    check_layout(answers, golden_logits, layout, everything=False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layouts in LAYOUTS.values() for layout in layouts], ids=identify)
def test_all_recorded_answers_at_every_layout(all_answers, golden_logits, layout):
    check_layout(all_answers, golden_logits, layout, everything=True)


@pytest.mark.parametrize("case", STAR, ids=lambda case: case["id"])
def test_star_at_its_own_number_of_ranks(answers, golden_logits, case):
    for anchor in ("shared", "recompute"):
        check(answers[name(case, (1, case["world_size"], 1), anchor)], case, golden_logits)


def test_a_rank_without_a_block_takes_part(answers):
    case = next(case for case in STAR if case["id"] == "tiny-a-star-w2-c32-q1-b32-afull")
    line, _ = answers[name(case, (1, 4, 1), "shared")]
    assert line["stats"]["kv_tokens_per_cp_rank"] == [32, 0, 0, 0]
