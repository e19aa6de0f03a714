"""debug.dump: runs at two layouts agree layer by layer, a run by another method parts where it should."""

import re

import pytest
from launch import ROOT, forked, generate_many, run_tool, write_jsonl

PHASES = ("prefill", "decode")
COMPARE = ROOT / "tools/compare_dumps.py"
CONTEXT = [(3 * i * i + i) % 251 for i in range(100)]
OVERLAP = ["attention.anchor_size=20", "attention.overlap_size=15"]
RUNS = {
    "one": [],
    "cp": ["parallel.context_parallel_size=2"],
    "pp": ["parallel.pipeline_model_parallel_size=2"],
    "tp": ["parallel.tensor_model_parallel_size=2"],
    "recompute": ["attention.anchor=recompute"],
    "dense": ["attention=dense"],
    "overlap": [*OVERLAP, "parallel.context_parallel_size=1"],
    "overlap cp": [*OVERLAP, "parallel.context_parallel_size=2"],
}


@pytest.fixture(scope="module")
def dumps(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dumps")
    rows = [{"id": i, "context_ids": CONTEXT, "query_ids": [3, 4, 5]} for i in range(2)]
    source = write_jsonl(folder / "in.jsonl", rows)
    common = [f"checkpoint={tiny}", f"input={source}", "attention.block_size=32", "inference.tokens_to_generate=3"]
    runs = []
    for name, extra in RUNS.items():
        files = [f"debug.dump={folder / name}", f"output={folder / name}.jsonl"]
        runs.append([*common, *files, *(extra or ["parallel.context_parallel_size=1"])])
    results = generate_many(2, runs, folder)
    assert [result["code"] for result in results] == [0] * len(runs), results
    again = generate_many(2, [[*common, f"debug.dump={folder / 'one'}"]], folder)
    assert "must be a new folder" in again[0]["error"]
    return folder


def compared(dumps, first, second):
    """(phase, layer, positions) -> largest difference."""
    done = forked(1, COMPARE, dumps / first, dumps / second)
    assert done.returncode == 0, done.stderr
    rows = [re.split(r"\s+", line) for line in done.stdout.splitlines()[1:]]
    return {(phase, layer, int(count)): float(largest) for phase, layer, count, largest, *_ in rows}


@pytest.mark.parametrize(
    ("one", "other"), [*(("one", other) for other in ("cp", "pp", "tp", "recompute")), ("overlap", "overlap cp")]
)
def test_layouts_agree_in_every_layer_and_position(dumps, one, other):
    found = compared(dumps, one, other)
    assert {key[:2] for key in found} == {
        (phase, f"layer_{n}") for phase in ("prefill", "decode") for n in (1, 2, 3, 4)
    }
    assert {key[2] for key in found if key[0] == "prefill"} == {100}
    assert {key[2] for key in found if key[0] == "decode"} == {5}  # the query's, and the tokens fed back
    assert max(found.values()) < 5e-4


def test_dense_attention_parts_after_the_first_block(dumps):
    found = compared(dumps, "one", "dense")
    assert found["prefill", "layer_1", 100] > 1e-3


def test_a_folder_without_a_dump_is_refused(tmp_path):
    done = run_tool(COMPARE, tmp_path, tmp_path)
    assert done.returncode == 1
    assert "holds no dump: make one with nemo-star generate debug.dump=" in done.stderr
