"""lm-evaluation-harness against the service, offline, on two tasks of our own: answers, and choices by probability."""

import json
import os
import subprocess
import sys

import pytest
from harness_tasks import write_tasks
from launch import ENVIRONMENT, ROOT
from serving import service

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'nemo-star[clients]'")
pytestmark = pytest.mark.slow

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


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
