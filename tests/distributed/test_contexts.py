"""Contexts that go on and conversations about them, at several layouts, against doing it at once."""

import json

import pytest
from family_models import save_model, tokens
from launch import ROOT, run_tool, torchrun

from nemo_star.checkpoint.convert import import_checkpoint

FAMILIES = ("qwen2", "gpt-oss", "glm4-moe")
"""Full layers; windows, sinks and experts; experts."""
STAR = [
    {"kind": "star", "block_size": 20},
    {"kind": "star", "block_size": 20, "anchor": "recompute"},
    {"kind": "star", "block_size": 7, "anchor_size": 3},
    {"kind": "star"},
]
EXACT = [{"kind": "ring"}, {"kind": "ulysses"}]
LAYOUTS = {1: [{}], 2: [{}, {"pipeline_model_parallel_size": 2}], 3: [{}]}
"""World size -> groups `parallel`."""
ENDS = [[30], [40, 60], [3, 25, 96]]
"""Where the parts of the context end, but for the last."""


def runs_of(folder, size):
    found = {}
    for family in FAMILIES:
        for parallel in LAYOUTS[size]:
            kinds = STAR + [each for each in EXACT if size < 3 or each["kind"] == "ring"]
            for attention in [*kinds, *([{"kind": "dense"}] if size == 1 else [])]:
                name = f"{family} {parallel} {attention}"
                checkpoint = str(folder / family / "converted")
                found[name] = {"checkpoint": checkpoint, "attention": attention, "parallel": parallel, "ends": ENDS}
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contexts")
    for family in FAMILIES:
        save_model(folder / family / "hf", family)
        import_checkpoint(folder / family / "hf", folder / family / "converted")
    return folder


@pytest.mark.parametrize("size", LAYOUTS)
def test_parts_and_turns_are_those_at_once(checkpoints, tmp_path, size):
    requests = {"runs": runs_of(checkpoints, size), "ids": tokens(97, seed=5), "query": tokens(6, seed=9)}
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    arguments = (ROOT / "tests/workers/contexts.py", tmp_path, tmp_path / "found.json")
    done = run_tool(*arguments) if size == 1 else torchrun(size, *arguments, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == requests["runs"].keys()
    assert {name: difference for name, difference in found.items() if difference > 5e-4} == {}
