"""The front door in Python: under torchrun at several layouts, and in plain python; against tools/generate.py."""

import json
import random

import pytest
from launch import ROOT, generate_many, read_jsonl, run_tool, torchrun, write_jsonl

from nemo_star.evaluation.needles import make_document, question

DOCUMENT = make_document(random.Random("llm"), filler_sentences=40, needles=3)
QUERIES = [question(key) for key in DOCUMENT.needles]
RUNS = {
    "alone": (1, {}),
    "cp": (2, {}),
    "dp": (2, {"context_parallel_size": 1}),
    "tp": (2, {"tensor_model_parallel_size": 2}),
}
"""Name -> (processes, the group `parallel`)."""


@pytest.fixture(scope="module")
def reports(demo, tmp_path_factory):
    """Run -> the report of each rank."""
    folder = tmp_path_factory.mktemp("llm")
    found = {}
    for name, (processes, parallel) in RUNS.items():
        requests, output = folder / f"{name}.json", folder / f"{name}.out.json"
        requests.write_text(json.dumps({"context": DOCUMENT.text, "queries": QUERIES, "parallel": parallel}))
        arguments = (ROOT / "tests/workers/llm.py", demo, requests, output)
        done = run_tool(*arguments) if processes == 1 else torchrun(processes, *arguments)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize("run", RUNS)
def test_every_rank_gets_the_right_answers_in_order(reports, run):
    assert len(reports[run]) == RUNS[run][0]
    for report in reports[run]:
        for (text, token_ids, reason), value in zip(report["answers"], DOCUMENT.needles.values(), strict=True):
            assert text.strip() == value
            assert reason == "stop"
            assert token_ids == report["answers"][list(DOCUMENT.needles.values()).index(value)][1]
        assert report["single"] == report["answers"][:1]


def test_layouts_agree_also_in_what_is_sampled(reports):
    alone = reports["alone"][0]
    for run in RUNS:
        for report in reports[run]:
            for key in ("tokens", "answers", "stopped", "samples", "logits"):
                assert report[key] == alone[key], (run, key)


def test_samples_of_a_question_differ_and_do_not_depend_on_its_neighbours(reports):
    samples = reports["alone"][0]["samples"]
    assert [len(of) for of in samples] == [3, 3, 3]
    assert len({tuple(token_ids) for _, token_ids, _ in samples[0]}) == 3
    assert reports["alone"][0]["samples alone"] == samples[1]
    assert reports["alone"][0]["logits"] == [[len(of[0][1]), 1536] for of in samples]


@pytest.mark.parametrize("run", RUNS)
def test_sequences_of_one_step_are_those_alone_and_leave_the_context_as_it_was(reports, run):
    assert all(report["unchanged"] for report in reports[run])
    assert max(report["batch"] for report in reports[run]) <= 5e-4


@pytest.mark.parametrize("run", RUNS)
def test_an_error_is_raised_on_every_rank(reports, run):
    assert {report["error"] for report in reports[run]} == {
        "query holds token id 1000000, outside the vocabulary of 1536 tokens"
    }


def test_the_tool_gives_the_same_tokens(reports, demo, tmp_path):
    rows = [{"id": number, "context": DOCUMENT.text, "query": query} for number, query in enumerate(QUERIES)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    run = [f"checkpoint={demo}", f"input={source}", f"output={tmp_path / 'out.jsonl'}"]
    (result,) = generate_many(2, [[*run, "attention.block_size=64", "inference.tokens_to_generate=12"]], tmp_path)
    assert result["code"] == 0, result
    lines = read_jsonl(tmp_path / "out.jsonl")
    assert [line["token_ids"] for line in lines] == [answer[1] for answer in reports["cp"][0]["answers"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": {"blok_size": 3}}, "blok_size"),
        ({"attention": {"kind": "full"}}, "attention.kind='full' is unknown"),
        ({"parallel": {"tensor_model_parallel_size": 3}}, "world size 1 is not divisible by"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_what_is_wrong_is_named_before_weights_are_loaded(demo, settings, message):
    from nemo_star import LLM

    with pytest.raises(ValueError, match=message):
        LLM(demo, **settings)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"stop": [""]}, "stop holds an empty string"),
        ({"n": 0}, "n=0 must be at least 1"),
        ({"max_tokens": "5"}, "max_tokens='5' must be a number"),
    ],
)
def test_sampling_params_are_checked(params, message):
    from nemo_star import SamplingParams

    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)
