"""JSON lines that share contexts: each is encoded once, questions decode together, the answers are those alone."""

import pytest
from launch import generate_many, read_jsonl, write_jsonl

CONTEXTS = [[(7 * i * i + (3 + c) * i) % 251 for i in range(90 + 13 * c)] for c in range(5)]
ROWS = [
    {"id": f"q{i}", "context_ids": CONTEXTS[i * 3 % 5], "query_ids": [3 + i, 4, 5][: 1 + i % 3], "note": i}
    for i in range(40)
]
RUNS = {
    "alone": ["inference.max_batch_size=1"],
    "four": ["inference.max_batch_size=4"],
    "sixteen": ["inference.max_batch_size=16", "inference.steps_per_block=3"],
    "replicas": ["inference.max_batch_size=4", "parallel.context_parallel_size=1"],
    "small-budget": ["inference.max_batch_size=4", "cache.budget_gib=0.00015"],
    "sampled": ["inference.greedy=false", "inference.temperature=3.0", "inference.max_batch_size=16"],
    "sampled-replicas": ["inference.greedy=false", "inference.temperature=3.0", "parallel.context_parallel_size=1"],
}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    source = write_jsonl(folder / "in.jsonl", ROWS)
    named = [{**row, "context_id": f"c{i * 3 % 5}"} for i, row in enumerate(ROWS)]
    named = [row if i < 5 else {k: v for k, v in row.items() if k != "context_ids"} for i, row in enumerate(named)]
    common = [f"checkpoint={tiny}", "attention.block_size=32", "inference.tokens_to_generate=7"]
    arguments = {
        name: [*common, f"input={source}", f"output={folder / name}.jsonl", *run] for name, run in RUNS.items()
    }
    arguments["named"] = [
        *common,
        f"input={write_jsonl(folder / 'named.in.jsonl', named)}",
        f"output={folder / 'named.jsonl'}",
    ]
    whole = arguments["named"]
    (folder / "resumed.jsonl").write_text("")
    arguments["resumed"] = [*whole[:-1], f"output={folder / 'resumed.jsonl'}", "resume=true"]
    unknown = write_jsonl(folder / "unknown.in.jsonl", [{"id": 1, "context_id": "c9", "query_ids": [3]}, ROWS[0]])
    arguments["unknown"] = [*common, f"input={unknown}", f"output={folder / 'unknown.jsonl'}"]
    results = dict(zip(arguments, generate_many(2, list(arguments.values()), folder), strict=True))
    assert [result["code"] for name, result in results.items() if name != "unknown"] == [0] * (len(results) - 1), (
        results
    )
    assert results["unknown"]["code"] == 3
    return folder


def lines(runs, name):
    """Answers without their times, and how often a prefill ran: each took a time of its own."""
    found = read_jsonl(runs / f"{name}.jsonl")
    return [{k: v for k, v in line.items() if k != "stats"} for line in found], len(
        {line["stats"]["prefill_seconds"] for line in found}
    )


@pytest.mark.parametrize("name", ["four", "sixteen", "replicas", "small-budget"])
def test_answers_do_not_depend_on_the_batch_or_the_replicas(runs, name):
    expected, _ = lines(runs, "alone")
    found, prefills = lines(runs, name)
    assert found == expected
    assert [line["id"] for line in found] == [row["id"] for row in ROWS]
    assert prefills == 5 if name != "small-budget" else prefills >= 5


def test_sampled_answers_depend_on_the_line_alone(runs):
    assert lines(runs, "sampled")[0] == lines(runs, "sampled-replicas")[0]
    assert lines(runs, "sampled")[0] != lines(runs, "alone")[0]


def test_a_context_named_once_may_be_asked_of_by_its_name(runs):
    expected, _ = lines(runs, "alone")
    for name in ("named", "resumed"):
        found, prefills = lines(runs, name)
        assert [line["token_ids"] for line in found] == [line["token_ids"] for line in expected]
        assert prefills == 5


def test_a_name_that_is_not_known_is_a_bad_line(runs):
    bad, good = read_jsonl(runs / "unknown.jsonl")
    assert "context_id 'c9' is not known: an earlier line must give it with its context" in bad["error"]
    assert len(good["token_ids"]) == 7
