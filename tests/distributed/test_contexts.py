"""Contexts that go on and conversations about them, at several layouts, against doing it at once."""

import json

import pytest
from family_models import save_model, tokens
from launch import ROOT, forked

from nemo_star.checkpoint.convert import import_checkpoint

FAMILIES = ("gpt-oss", pytest.param("qwen2", marks=pytest.mark.slow), pytest.param("glm4-moe", marks=pytest.mark.slow))
"""Windows, sinks and experts; full layers; experts."""
STAR = [
    {"kind": "star", "block_size": 20},
    {"kind": "star", "block_size": 20, "anchor": "recompute"},
    {"kind": "star", "block_size": 7, "anchor_size": 3},
    {"kind": "star", "block_size": 7, "anchor_size": 3, "overlap_size": 5},
    {"kind": "star"},
]
EXACT = [{"kind": "ring"}, {"kind": "ulysses"}]
LAYOUTS = {1: [{}], 2: [{}, {"pipeline_model_parallel_size": 2}], 3: [{}]}
"""World size -> groups `parallel`."""
ENDS = [[30], [40, 60], [3, 25, 96]]
"""Where the parts of the context end, but for the last."""


def runs_of(checkpoint, size):
    found = {}
    for parallel in LAYOUTS[size]:
        kinds = STAR + [each for each in EXACT if size < 3 or each["kind"] == "ring"]
        for attention in [*kinds, *([{"kind": "dense"}] if size == 1 else [])]:
            run = {"checkpoint": str(checkpoint), "attention": attention, "parallel": parallel, "ends": ENDS}
            found[f"{parallel} {attention}"] = run
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_parts_and_turns_are_those_at_once(tmp_path, family, size):
    save_model(tmp_path / "hf", family)
    import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    requests = {"runs": runs_of(tmp_path / "converted", size), "ids": tokens(97, seed=5), "query": tokens(6, seed=9)}
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    arguments = (ROOT / "tests/workers/contexts.py", tmp_path, tmp_path / "found.json")
    done = forked(size, *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == requests["runs"].keys()
    assert {name: difference for name, difference in found.items() if difference > 5e-4} == {}
