import json

import pytest
from launch import ROOT, forked

from nemo_star.models.sequence_parallel import check_sequence_parallel
from nemo_star.parallel.layout import Layout


def test_sequence_parallel_changes_nothing_but_who_holds_what(tiny, tmp_path):
    """tp 2, pp 2: same K/V and logits; hidden states halve where a block's length is even, and only in prefill."""
    done = forked(4, ROOT / "tests/workers/sequence_parallel.py", tiny, tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    in_16_bits = report.pop("bfloat16")
    assert in_16_bits["types"] == ["torch.bfloat16"]
    assert in_16_bits["difference"] < 0.1
    query_and_token = [3, 1]
    blocks = {"32": [32, 32, 32, 4], "33": [33, 33, 33, 1]}
    halves = {"32": [16, 16, 16, 2], "33": [33, 33, 33, 1]}
    for block_size, row in report.items():
        assert row["difference"] < 1e-4
        assert row["lengths"] == [blocks[block_size] + query_and_token] * 4
        assert row["divided"] == [halves[block_size] + query_and_token] * 4


@pytest.mark.parametrize(
    ("tp", "device", "message"),
    [
        (1, "cuda", "parallel.tensor_model_parallel_size is 1: set it to 2 or more"),
        (2, "cpu", "parallel.sequence_parallel=true needs GPUs .* this is cpu"),
    ],
)
def test_where_it_does_not_run_it_is_refused(tp, device, message):
    layout = Layout(tp=tp, cp=1, dp=1, pp=1)
    with pytest.raises(ValueError, match=message):
        check_sequence_parallel(True, layout, device)
    check_sequence_parallel(False, layout, device)


def test_on_gpus_with_tensor_parallelism_it_runs():
    check_sequence_parallel(True, Layout(tp=2, cp=1, dp=1, pp=1), "cuda")
