import json

import torch.distributed as dist
from launch import ROOT, forked

LAYERS = 4  # of the tiny model
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def test_one_collective_a_layer_over_cp(tmp_path, tiny):
    """Prefill: one broadcast a layer (shared anchor) but for the last, which nobody attends in, and nothing else;
    decode: one all-gather a layer, and one broadcast of the token (with cp alone, the replica is the cp group).

    Sharded decode adds one all-reduce a layer over tp x cp, in the place of tp's, and one all-gather for the head.
    """
    done = forked(2, ROOT / "tests/workers/count_collectives.py", tiny, tmp_path / "counts.json")
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    prefill = {"broadcast": LAYERS - 1}
    assert counts["replicated"] == {"prefill": prefill, "decode": {ALL_GATHER: LAYERS, "broadcast": 1}}
    sharded = {ALL_GATHER: LAYERS + 1, "all_reduce": LAYERS, "broadcast": 1}
    assert counts["sharded"] == {"prefill": prefill, "decode": sharded}
