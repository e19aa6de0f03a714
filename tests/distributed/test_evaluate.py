"""tools/evaluate.py on two ranks: made samples and given ones, interrupted, resumed."""

import csv
import random
import re

import pytest
from launch import ROOT, read_jsonl, torchrun, write_jsonl

from nemo_star.evaluation.needles import make_document, question

SWEEP = (
    "compare=[dense,ring,star]",
    "block_sizes=[n/2,256]",
    "anchor_sizes=[0]",
    "tasks=[niah_single_1,babilong_qa1_offline]",
    "lengths=[1024,1536]",
    "samples=3",
)


def evaluate(checkpoint, folder, *arguments, processes=2):
    return torchrun(processes, ROOT / "tools/evaluate.py", f"checkpoint={checkpoint}", f"output={folder}", *arguments)


@pytest.fixture(scope="module")
def swept(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "out"
    done = evaluate(demo, folder, *SWEEP)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_every_method_answers_every_sample(swept):
    folder, printed = swept
    lines = read_jsonl(folder / "samples.jsonl")
    names = ["dense", "ring", *(f"star {block} anchor {anchor}" for block in ("n/2", "256") for anchor in ("0",))]
    assert len(lines) == len(names) * 2 * 2 * 3
    assert list(dict.fromkeys(line["contender"] for line in lines)) == names
    for line in lines:
        assert 0 <= line["score"] <= 100
        assert line["context_tokens"] + line["query_tokens"] <= line["length"]
    rows = list(csv.DictReader((folder / "report.csv").open()))
    assert len(rows) == len(names) * 2 * 3  # both tasks, and all
    assert (folder / "report.md").read_text() in printed
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_ring_and_one_block_are_dense_sample_by_sample(swept):
    lines = read_jsonl(swept[0] / "samples.jsonl")
    by_name = {}
    for line in lines:
        by_name.setdefault(line["contender"], {})[line["task"], line["length"], line["id"]] = line["prediction"]
    assert by_name["ring"] == by_name["dense"]
    assert by_name["star 256 anchor 0"] != by_name["dense"]


def predictions(lines):
    return {(line["contender"], line["task"], line["length"], line["id"]): line["prediction"] for line in lines}


def scores(folder):
    """The report less its times."""
    return [re.sub(r"\| [^|]*\|[^|]*\|$", "", line) for line in (folder / "report.md").read_text().splitlines()]


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_to_the_same_report(demo, swept, tmp_path):
    whole = swept[0] / "samples.jsonl"
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "sweep.json").write_bytes((swept[0] / "sweep.json").read_bytes())
    content = whole.read_bytes()
    (folder / "samples.jsonl").write_bytes(content[: len(content) * 2 // 3])
    done = evaluate(demo, folder, *SWEEP, "resume=true")
    assert done.returncode == 0, done.stderr
    assert scores(folder) == scores(swept[0])
    again, before = read_jsonl(folder / "samples.jsonl"), read_jsonl(whole)
    kept = content[: len(content) * 2 // 3].count(b"\n")
    assert again[:kept] == before[:kept]
    assert f" {kept}/{len(before)} " in done.stderr  # where the bar begins
    # Replicas divide what is left otherwise, so lines come in another order.
    assert predictions(again) == predictions(before)


def test_given_samples_are_scored(demo, tmp_path):
    rows = []
    for number in range(5):
        document = make_document(random.Random(f"given {number}"), filler_sentences=30, needles=2)
        key, value = next(iter(document.needles.items()))
        rows.append({"id": number, "task": "own", "context": document.text, "query": question(key), "outputs": [value]})
    source = write_jsonl(tmp_path / "given.jsonl", rows)
    done = evaluate(demo, tmp_path / "out", f"input={source}", "lengths=[512,1024]", processes=1)
    assert done.returncode == 0, done.stderr
    lines = read_jsonl(tmp_path / "out/samples.jsonl")
    assert [line["score"] for line in lines if line["contender"] == "dense"] == [100.0] * 5
    assert {line["task"] for line in lines} == {"own"}
