"""Megatron's Transformer Engine layers with our attention, on a stand-in for Transformer Engine."""

import json

import pytest
import torch
from family_models import CASES, save_model
from launch import ROOT, run_tool
from te_releases import RELEASES, signature

from nemo_star.checkpoint.convert import import_checkpoint


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory):
    """What tests/workers/te_layers.py found with the stand-in on the path."""
    folder = tmp_path_factory.mktemp("families")
    for case in CASES:
        save_model(folder / "hf" / case, case)
        import_checkpoint(folder / "hf" / case, folder / case)
    done = run_tool(
        ROOT / "tests/workers/te_layers.py",
        tiny,
        *(folder / case for case in CASES),
        packages=ROOT / "tests/fake_transformer_engine",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_one_checkpoint_loads_into_both_kinds_of_layers(report):
    """Layer spec, checkpoint keys, fused rotary embedding by position id, kernel: the same logits as Megatron's own."""
    assert report["found"] == "Transformer Engine 2.9.0 works"
    own, theirs = report["classes"]
    assert {"ColumnParallelLinear", "RowParallelLinear"} <= set(own)
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "StarAttention", "RMSNorm"} <= set(theirs)
    assert not {"ColumnParallelLinear", "RowParallelLinear"} & set(theirs)
    own_logits, their_logits, sharded_logits, _ = (torch.tensor(logits) for logits in report["logits"])
    torch.testing.assert_close(their_logits, own_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sharded_logits, own_logits, atol=1e-5, rtol=1e-5)  # fc1's own norm, too


def test_long_blocks_are_rotated_in_pieces(report):
    """32 tokens in flight, 9 at a time; a query's 3 in one call, by Megatron."""
    _, their_logits, _, logits = (torch.tensor(logits) for logits in report["logits"])
    assert torch.equal(logits, their_logits)
    tokens = report["pieces"]
    assert tokens[:6] == [18, 14, 9, 9, 9, 5]  # Q, whose tokens lie closer, and K, a view of the fused QKV
    assert {3, 1} <= set(tokens)


@pytest.mark.parametrize("case", CASES)
def test_a_family_computes_the_same_in_both(report, case):
    difference, difference_by_torch, called = report["families"][case]
    assert difference <= 5e-4
    assert difference_by_torch <= 5e-4
    assert called == []


def test_decode_calls_transformer_engine_s_layers_unless_told_otherwise(report):
    """Else the test above would compare them with themselves."""
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "RMSNorm"} <= set(report["called in decode"])


@pytest.mark.parametrize("release", RELEASES)
def test_what_megatron_builds_fits_a_release(report, release):
    """Layers, norms and rotary embedding, as this release of Megatron calls them, bind to Transformer Engine's."""
    names = {name for name, *_ in report["calls"]}
    assert names == {
        "DotProductAttention.__init__",
        "DotProductAttention.forward",
        "LayerNormLinear.__init__",
        "Linear.__init__",
        "RMSNorm.__init__",
        "apply_rotary_pos_emb",
        "fused_attn_fwd",
    }
    for name, positional, keywords in report["calls"] + report["family_calls"]:
        signature(RELEASES[release][name]).bind(*[None] * positional, **dict.fromkeys(keywords))
