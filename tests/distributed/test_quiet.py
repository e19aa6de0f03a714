"""What the libraries say that is not for a user stays unsaid; everything else they say is heard."""

import logging

import pytest
from launch import ROOT, run_tool

import nemo_star  # noqa: F401  what is tested

SILENCED = [
    ("torch.utils.cpp_extension", "No CUDA runtime is found, using CUDA_HOME='/usr'"),
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED. Please reference the migration guide"),
    ("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated and will be removed"),
]


@pytest.mark.parametrize(("name", "message"), SILENCED)
def test_exactly_these_messages_are_silent(caplog, name, message):
    logging.getLogger(name).warning(message)
    logging.getLogger(name).warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_an_answer_brings_only_lines_of_our_own(tiny, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": 1, "context_ids": [1, 2, 3, 4], "query_ids": [5]}\n')
    settings = [f"checkpoint={tiny}", f"input={source}", "inference.tokens_to_generate=2", "attention=dense"]
    done = run_tool(ROOT / "tools/generate.py", *settings)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    ours = ("dense attention: ", "requests: ", "peak memory per rank: ")
    assert [line for line in lines if not line.startswith(ours)] == []
