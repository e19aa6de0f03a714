"""What one rank's failure does to the others, and to the output."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from launch import ENVIRONMENT, ROOT, torchrun, write_jsonl


def start(folder, checkpoint, rows):
    """tools/generate.py on two ranks, in the background; the launcher's process."""
    source = write_jsonl(folder / "in.jsonl", rows)
    tool = [ROOT / "tools/generate.py", f"checkpoint={checkpoint}", f"input={source}", f"output={folder / 'out.jsonl'}"]
    settings = ["attention.block_size=1024", "inference.tokens_to_generate=400", "inference.ignore_eos=true"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, tool), *settings]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def wait_for_a_line(job, output):
    """Until the first answer is written."""
    while not (output.exists() and output.stat().st_size):
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(timeout=0.1)
        assert job.poll() is None, job.stderr.read()


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_job_and_leaves_whole_lines(tmp_path, tiny, victim):
    row = {"context_ids": [i * i % 251 for i in range(6000)], "query_ids": [1, 2]}
    job = start(tmp_path, tiny, [{"id": number, **row} for number in range(200)])
    wait_for_a_line(job, tmp_path / "out.jsonl")
    ranks = {int(child.environ()["RANK"]): child.pid for child in psutil.Process(job.pid).children()}
    os.kill(ranks[victim], signal.SIGKILL)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "Traceback" not in stderr.partition("ChildFailedError")[0].replace(
        "Traceback (most recent call last):\n", "", 1
    )
    assert f"rank      : {victim} (local_rank: {victim})\n  exitcode  : -9" in stderr.partition("Root Cause")[2]
    content = (tmp_path / "out.jsonl").read_text()
    assert content.endswith("\n")
    assert [json.loads(line)["id"] for line in content.splitlines()] == list(range(content.count("\n")))


def test_a_rank_that_raises_is_named_first(tmp_path):
    done = torchrun(2, ROOT / "tests/workers/failing_rank.py", timeout=60)
    assert done.returncode != 0
    assert "rank 1 failed: RuntimeError: no more memory on this rank" in done.stderr
    assert "rank 0" not in done.stderr.partition("rank 1 failed")[0]
    assert "lost its connection" not in done.stderr


def test_a_hang_ends_the_job_and_says_where_each_rank_was(tmp_path):
    done = torchrun(2, ROOT / "tests/workers/hanging_rank.py", timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("no rank has made a step for 0.02 minutes (parallel.timeout_minutes)") == 1
    assert "Last seen at: rank 0: the start; rank 1: layer 1 of its stage" in done.stderr


def test_the_layer_in_ones_own_model():
    """The example of the documentation: the same tokens alone and over two ranks."""
    alone, shared = (torchrun(processes, ROOT / "docs/own_model.py") for processes in (1, 2))
    assert alone.returncode == shared.returncode == 0, alone.stderr + shared.stderr
    assert len(alone.stdout.split()) == 8
    assert alone.stdout == shared.stdout
