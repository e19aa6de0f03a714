"""A method of somebody else's, defined in tests/support, runs through generate, benchmark and plan."""

import json

import pytest
from launch import ROOT, generate_many, read_jsonl, run_tool, torchrun, write_jsonl

TOY = "toy_method.SlidingWindow"
CONTEXT = [(5 * i * i + i) % 251 for i in range(150)]
LAYOUTS = {"cp1": (1, 1, 1), "cp2": (1, 2, 1), "tp2": (2, 1, 1), "pp2": (1, 1, 2)}
"""Name -> (tp, cp, pp); on two ranks, what remains is data parallel."""


@pytest.fixture(scope="module")
def answers(tiny, tmp_path_factory):
    """Run -> its line, from one launch on two ranks."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "attention").mkdir()
    (folder / "attention" / "window.yaml").write_text(f"defaults: [star]\nkind: {TOY}\n")
    source = write_jsonl(folder / "in.jsonl", [{"id": 0, "context_ids": CONTEXT, "query_ids": [3, 4, 5]}])
    paths = ["--config-dir", str(folder), f"checkpoint={tiny}", f"input={source}", "inference.tokens_to_generate=6"]
    runs = {}
    for name, (tp, cp, pp) in LAYOUTS.items():
        sizes = {"tensor_model": tp, "context": cp, "pipeline_model": pp}
        layout = [f"parallel.{key}_parallel_size={size}" for key, size in sizes.items()]
        runs[name] = [*paths, "attention=window", "attention.block_size=32", *layout]
    one_rank = ["parallel.context_parallel_size=1"]
    runs["one block"] = [*paths, f"attention.kind={TOY}", "attention.block_size=200", *one_rank]
    runs["dense"] = [*paths, "attention=dense"]
    for name, arguments in runs.items():
        arguments.append(f"output={folder / name}.jsonl")
    results = generate_many(2, list(runs.values()), folder)
    assert [result["code"] for result in results] == [0] * len(runs), results
    assert f"{TOY} attention: 150 context tokens" in results[0]["stderr"]
    return {name: read_jsonl(folder / f"{name}.jsonl")[0] for name in runs}


def test_its_answer_does_not_depend_on_the_layout(answers):
    assert len({tuple(answers[name]["token_ids"]) for name in LAYOUTS}) == 1
    assert answers["cp1"]["token_ids"] != answers["dense"]["token_ids"]


def test_its_blocks_are_dealt_out_as_it_says(answers):
    assert answers["cp2"]["stats"]["kv_tokens_per_cp_rank"] == [32 + 32 + 22, 64]


def test_one_block_is_dense_attention(answers):
    assert answers["one block"]["token_ids"] == answers["dense"]["token_ids"]


def test_it_is_measured_and_planned(tmp_path):
    """The planner counts the operations and the K/V of the benchmark's rows."""
    rows = tmp_path / "rows.json"
    shape = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.vocab_size=100"]
    arguments = [f"compare=[{TOY},star:shared]", "context_tokens=[150]", "attention.block_size=32", *shape]
    brief = ["repeats=1", "warm_up_rounds=0", "decode_tokens=1", f"output={rows}"]
    done = torchrun(2, ROOT / "tools/benchmark.py", *arguments, *brief)
    assert done.returncode == 0, done.stderr
    toy, star = json.loads(rows.read_text())
    assert (toy["kind"], toy["attention"], toy["anchor"], toy["block_size"]) == (TOY, TOY, None, 32)
    assert toy["prefill_flops"] != star["prefill_flops"]
    again = run_tool(ROOT / "tools/plan.py", f"check={rows}", "model=small", "machine=cpu", *shape)
    assert again.returncode == 0, again.stderr
    assert "K/V bytes agree in 2 of 2 rows" in again.stdout
    planned = run_tool(ROOT / "tools/plan.py", f"compare=[{TOY},dense]", "context_tokens=4096", "world_size=2")
    assert planned.returncode == 0, planned.stderr
    assert f"{TOY} with other blocks" in planned.stdout


@pytest.mark.parametrize("kind", ["toy_method.Missing", "missing.Method", "toy_method.Block"])
def test_what_is_no_method_is_refused(tmp_path, kind):
    done = run_tool(ROOT / "tools/plan.py", f"compare=[{kind}]", cwd=tmp_path)
    assert done.returncode == 1
    assert f"compare: '{kind}' is unknown; known: ring, star:shared" in done.stderr
