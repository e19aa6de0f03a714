"""Text in, text out: the bundled demo model, one question streamed and JSON lines, at several layouts."""

import json
import random
import re
import shutil

import pytest
from launch import ROOT, generate_many, read_jsonl, run_tool, torchrun, write_jsonl

from nemo_star.evaluation.needles import make_document, question
from nemo_star.text.tokenizer import Tokenizer

GENERATE = ROOT / "tools" / "generate.py"
ASSETS = ROOT / "assets"
DOCUMENTS = [make_document(random.Random(f"test {seed}"), filler_sentences=60, needles=2) for seed in range(4)]


@pytest.fixture(scope="module")
def rows():
    return [
        {"id": number, "context": document.text, "query": question(key), "outputs": [value]}
        for number, document in enumerate(DOCUMENTS)
        for key, value in [next(iter(document.needles.items()))]
    ]


def test_the_demo_recipe_answers_its_question(demo, tmp_path):
    """Star on two ranks and dense on one, as `make demo` does: the needle's value, alone on standard output."""
    text = (ASSETS / "demo_document.txt").read_text()
    arguments = [GENERATE, "--config-name", "demo", f"checkpoint={demo}"]
    star = torchrun(2, *arguments, cwd=tmp_path)
    dense = run_tool(*arguments, "attention=dense", cwd=tmp_path)
    for done in (star, dense):
        assert done.returncode == 0, done.stderr
        value = done.stdout.strip()
        assert re.fullmatch(r"\d{7}", value)
        assert f"is: {value}." in text
        assert "peak memory per rank" in done.stderr
        assert "warning" not in done.stderr.lower()
    assert star.stdout == dense.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_document_from_standard_input(demo, rows):
    done = run_tool(
        GENERATE, f"checkpoint={demo}", "context_file=-", f"query={rows[0]['query']}", stdin=rows[0]["context"] + "\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == rows[0]["outputs"][0]


@pytest.fixture(scope="module")
def answers(demo, rows, tmp_path_factory):
    """{name: answer lines} of several runs of the same questions on four ranks."""
    folder = tmp_path_factory.mktemp("text")
    source = write_jsonl(folder / "in.jsonl", rows * 2)
    common = [f"checkpoint={demo}", f"input={source}", "inference.tokens_to_generate=12"]
    tp2 = "parallel.tensor_model_parallel_size=2"
    pp3 = "parallel.pipeline_model_parallel_size=2"
    cp = "parallel.context_parallel_size="
    sampled = ["inference=sampled", "inference.temperature=3.0", "inference.tokens_to_generate=6"]
    runs = {
        "star": [],
        "dense-dp": ["attention=dense", cp + "1"],
        "tp-pp": [tp2, pp3],
        "dp2": [cp + "2"],
        "dp1": [cp + "4"],
        "sampled-dp4": [cp + "1", "attention=dense", *sampled],
        "sampled-dp1": [cp + "4", "attention=ring", *sampled],
        "end-string": ["inference.end_strings=['5','7']", cp + "4"],
    }
    arguments = [[*common, f"output={folder / name}.jsonl", *overrides] for name, overrides in runs.items()]
    results = generate_many(4, arguments, folder)
    assert [result["code"] for result in results] == [0] * len(runs), results
    return {name: read_jsonl(folder / f"{name}.jsonl") for name in runs}


def without_stats(lines):
    return [{key: value for key, value in line.items() if key != "stats"} for line in lines]


@pytest.mark.parametrize("name", ["star", "dense-dp", "tp-pp", "dp2"])
def test_answers_are_right_at_every_layout(answers, name):
    for line in answers[name]:
        assert line["text"] == line["outputs"][0]
        assert line["finish_reason"] == "stop"
        assert line["token_ids"][-1] == 2


def test_replicas_write_the_same_file_in_the_order_of_the_input(answers):
    assert without_stats(answers["dp2"]) == without_stats(answers["dp1"])
    assert [line["id"] for line in answers["dp2"]] == [0, 1, 2, 3] * 2
    assert without_stats(answers["sampled-dp4"]) == without_stats(answers["sampled-dp1"])
    assert len({line["text"] for line in answers["sampled-dp4"]}) > 2


def test_an_end_string_ends_the_answer_and_is_not_in_its_text(answers):
    for line, whole in zip(answers["end-string"], answers["star"], strict=True):
        assert line["text"] == re.split("[57]", whole["text"])[0]
        assert len(line["token_ids"]) <= len(whole["token_ids"])
        assert line["finish_reason"] == "stop"


def test_a_chat_template_wraps_both_texts(demo, tmp_path):
    """The template of the copy adds words around the same question: the answer stays right."""
    chat = shutil.copytree(demo, tmp_path / "chat")
    config = json.loads((chat / "hf" / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (chat / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    key, value = next(iter(DOCUMENTS[0].needles.items()))
    done = run_tool(
        GENERATE, f"checkpoint={chat}", "chat_template=true", f"context={DOCUMENTS[0].text}", f"query={question(key)}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == value
    refused = run_tool(GENERATE, f"checkpoint={demo}", "chat_template=true", "context=a", "query=b")
    assert refused.returncode == 1
    assert "has no chat template" in refused.stderr


def test_messages_of_a_file(demo, tmp_path):
    """Document and question in one message, and in two; a line that is wrong; the end token as an end string."""
    chat = shutil.copytree(demo, tmp_path / "chat")
    template = "{{ bos_token }}{{ greeting }}{{ messages | map(attribute='content') | join('\\n\\n') }}"
    (chat / "hf" / "chat_template.jinja").write_text(template)
    (key, value), text = next(iter(DOCUMENTS[0].needles.items())), DOCUMENTS[0].text
    one = [{"role": "user", "content": f"{text}\n\n{question(key)}"}]
    two = [{"role": "system", "content": text}, {"role": "user", "content": question(key)}]
    rows = [{"id": 1, "messages": one}, {"id": 2, "messages": two}, {"id": 3, "messages": one[:0]}]
    rows.append({"id": 4, "messages": one, "chat_template_kwargs": {"greeting": "Some text. "}})
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    common = [f"checkpoint={chat}", f"input={source}", "inference.tokens_to_generate=12"]
    runs = {
        "plain": [],
        "ended": ["inference.ignore_eos=true", "inference.end_strings=['</s>']"],
        "greeted": ["chat_template_kwargs={greeting: 'Some text. '}"],
    }
    arguments = [[*common, f"output={tmp_path / name}.jsonl", *more] for name, more in runs.items()]
    assert [result["code"] for result in generate_many(2, arguments, tmp_path)] == [3] * len(runs)
    found = {name: read_jsonl(tmp_path / f"{name}.jsonl") for name in runs}
    for lines in found.values():
        assert "messages must be a list of at least one" in lines.pop(2)["error"]
        for line in lines:
            assert line["text"] == value
            assert (line["token_ids"][-1], line["finish_reason"]) == (2, "stop")
            assert "messages" not in line
            assert line["query_tokens"] < line["context_tokens"] / 10
    greeted = len(Tokenizer.load(chat / "hf").encode_query("Some text."))
    plain, asked = ([line["context_tokens"] for line in found[name]] for name in ("plain", "greeted"))
    assert plain[2] == plain[0] + greeted
    assert asked == [plain[0] + greeted, plain[1] + greeted, plain[2]]


def test_needle_questions_are_made_to_length_and_scored(tmp_path):
    tool = ROOT / "tools" / "needles.py"
    made = run_tool(
        tool, "make", "--tokenizer", ASSETS / "demo_model", "--tokens", 500, "--needles", 3, "--documents", 4
    )
    rows = [json.loads(line) for line in made.stdout.splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2, 3]
    tokenizer = Tokenizer.load(ASSETS / "demo_model")
    for row in rows:
        assert f"is: {row['outputs'][0]}." in row["context"]
        assert 460 <= len(tokenizer.encode_context(row["context"])) <= 500
    answers = [{**row, "text": row["outputs"][0] if row["id"] else "1"} for row in rows]
    scored = run_tool(tool, "score", write_jsonl(tmp_path / "answers.jsonl", answers))
    assert scored.stdout == "3 of 4 right (75.0%)\n"
