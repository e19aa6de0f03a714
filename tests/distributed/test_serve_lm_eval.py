"""lm-evaluation-harness against the service, offline, on two tasks of our own: answers, and choices by probability."""

import json
import os
import random
import subprocess
import sys

import pytest
from launch import ENVIRONMENT, ROOT
from serving import service

from nemo_star.evaluation.needles import make_document, question

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'nemo-star[clients]'")
pytestmark = pytest.mark.slow

GENERATED = """
task: needle
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 16, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list: [{{name: strip, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
"""
CHOSEN = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def rows(name, sentences):
    for number in range(6):
        rng = random.Random(f"{name} {number}")
        document = make_document(rng, filler_sentences=sentences, needles=2)
        key, value = next(iter(document.needles.items()))
        choices = [value, *(str(rng.randrange(10**6, 10**7)) for _ in range(3))]
        rng.shuffle(choices)
        prompt = f"{document.text}\n\n{question(key)}"
        yield {"prompt": prompt, "answer": value, "choices": choices, "label": choices.index(value)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, text, sentences in (("needle", GENERATED, 40), ("choice", CHOSEN, 4)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(name, sentences)))
        (folder / f"{name}.yaml").write_text(text.format(file=file))
    return folder


@pytest.mark.parametrize(
    ("kind", "route", "names"),
    [("local-completions", "completions", "needle,choice"), ("local-chat-completions", "chat/completions", "needle")],
)
def test_all_is_right(demo, tasks, tmp_path, kind, route, names):
    with service(demo) as running:
        model = f"model=demo,base_url={running.address}/v1/{route},num_concurrent=4,max_length=8192"
        model += f",tokenizer={ROOT / 'assets/demo_model'}"
        command = [sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", model, "--tasks", names]
        command += ["--include_path", str(tasks), "--output_path", str(tmp_path)]
        command += ["--apply_chat_template"] if "chat" in kind else []
        environment = {**ENVIRONMENT, **OFFLINE, "HF_HOME": str(tmp_path / "cache"), "PATH": os.environ["PATH"]}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("results*.json")
    results = json.loads(file.read_text())["results"]
    assert results["needle"]["exact_match,strip"] == 1
    if "choice" in names:
        assert results["choice"]["acc,none"] == 1
