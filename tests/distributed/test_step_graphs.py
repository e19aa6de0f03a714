"""Decode steps on two ranks, recorded and replayed: collectives too. (One rank: tests/unit/test_graphs.py.)"""

import json

import pytest
from launch import ROOT, torchrun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tiny):
    worker = ROOT / "tests/workers/step_graphs.py"
    done = torchrun(2, worker, tiny, packages=ROOT / "tests/fake_transformer_engine")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("["))
    return {row["case"]: row for row in json.loads(line)}


@pytest.mark.parametrize("case", ["cp", "cp sharded", "tp", "tp linears"])
def test_replayed_steps_are_the_plain_path(report, case):
    row = report[case]
    assert row["same_tokens"]
    assert row["difference"] <= 5e-4
    assert row["replays"] == [10]
    if case.startswith("cp"):  # the token's owner changes from step to step
        assert all(min(of_sequence) >= 5 for of_sequence in row["own_tokens"])


def test_rows_of_torch_s_linear_layers_are_summed_over_tp(report):
    assert report["tp linears"]["torch_linears"] == 2 * report["tp linears"]["summed"] > 0
