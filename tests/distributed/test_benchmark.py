"""tools/benchmark.py in one launch of a tiny shape; transformers on our weights gives our answer."""

import json

import pytest
import torch
from launch import ROOT, torchrun

from nemo_star.benchmarking.report import check_plots, draw, table
from nemo_star.config.benchmark import BenchmarkConfig
from nemo_star.config.strict import parse

KINDS = ["star:shared", "star:recompute", "ring+decode:sharded", "ulysses+decode:replicated", "dense", "transformers"]
LENGTHS = [96, 160]
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64, "vocab_size": 100}
MODEL = {**SHAPE, "num_query_groups": 2, "kv_channels": 16}
"""Heads of their own dimension, not hidden_size / num_attention_heads."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(rows, what was printed, folder of plots)."""
    folder = tmp_path_factory.mktemp("benchmark")
    shape = [f"model.{name}={value}" for name, value in SHAPE.items()]
    sizes = [f"context_tokens={LENGTHS}", "attention.block_size=32", "repeats=2", "decode_tokens=2"]
    outputs = [f"output={folder / 'rows.json'}", f"plot={folder}"]
    compare = f"compare=[{','.join(KINDS)}]"
    done = torchrun(2, ROOT / "tools/benchmark.py", compare, *shape, *sizes, *outputs, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "rows.json").read_text()), done.stdout, folder


def test_rows_of_all_kinds_and_lengths(measured):
    rows, printed, _ = measured
    assert [(row["context_tokens"], row["kind"]) for row in rows] == [(n, kind) for n in LENGTHS for kind in KINDS]
    for row in rows:
        alone = row["kind"] in ("dense", "transformers")
        assert (row["tp"], row["pp"], row["cp"]) == (1, 1, 1 if alone else 2)
        assert row["decode"] == ("sharded" if row["kind"].endswith("sharded") else "replicated")
        assert row["anchor"] == (row["kind"].partition(":")[2] if row["attention"] == "star" else None)
        block = 32 if row["attention"] == "star" else row["context_tokens"]
        assert (row["block_size"], row["anchor_size"]) == (block, 32 if row["attention"] == "star" else 0)
        for name in ("prefill_seconds", "decode_seconds_per_token", "prefill_flops", "peak_memory_bytes"):
            assert row[name] > 0
        assert row["repeats"] == 2
        times = {"prefill_seconds", "first_token_seconds", "decode_seconds_per_token"}
        assert set(row["first_round"]) == times - ({"first_token_seconds"} if row["kind"] == "transformers" else set())
        assert row["kernel"] == (None if row["kind"] == "transformers" else "numba")
        assert row["kind"] in printed
    by_kind = {row["kind"]: row for row in rows if row["context_tokens"] == 160}
    assert by_kind["star:recompute"]["prefill_flops"] > by_kind["star:shared"]["prefill_flops"]
    # K and V of 2 layers, 2 KV heads, 8 channels, float32; the first rank holds three blocks of five.
    assert by_kind["star:shared"]["kv_bytes_per_rank"] == 2 * 2 * 2 * 8 * 4 * 96
    assert by_kind["dense"]["kv_bytes_per_rank"] == 2 * 2 * 2 * 8 * 4 * 160
    whole, sliced = (by_kind[kind]["decode_weight_bytes"] for kind in ("star:shared", KINDS[2]))
    assert (whole, sliced) == (2 * 32 * (64 + 32 + 192) * 4, 2 * 32 * (64 + 32 + 96) * 4)


def test_pictures_are_drawn(measured):
    for name in ("time.png", "memory.png", "speedup.png"):
        assert (measured[2] / name).read_bytes().startswith(b"\x89PNG")


def test_the_table_has_ratios_over_the_first_kind(measured, tmp_path):
    rows = [dict(row) for row in measured[0][:2]]
    rows[0] |= {"prefill_seconds": 2.0, "prefill_flops": 100}
    rows[1] |= {"prefill_seconds": 3.0, "prefill_flops": 140}
    assert table(rows).splitlines()[2].split()[2:5] == ["3.000", "1.50", "1.40"]
    assert [path.name for path in draw(rows, tmp_path)] == ["time.png", "memory.png", "speedup.png"]


def test_a_missing_folder_for_plots_is_refused():
    with pytest.raises(ValueError, match="plot=missing is no directory"):
        check_plots("missing")


@pytest.mark.parametrize("kind", ["star:twice", "ring:shared", "dense+decode:sharded", "star+decode", "flash", "star+"])
def test_unknown_kinds_are_refused(kind):
    known = "ring, star:shared, star:recompute, summary, ulysses, each"
    with pytest.raises(ValueError, match=f"is unknown; known: {known}"):
        parse(BenchmarkConfig, {"compare": [kind], "model": MODEL})


def test_a_kind_named_twice_is_refused():
    with pytest.raises(ValueError, match="a word comes twice"):
        parse(BenchmarkConfig, {"compare": ["ring", "ring"], "model": MODEL})


def test_transformers_computes_the_same_on_our_weights(groups):
    from nemo_star.benchmarking.contenders import ALONE, build_contenders
    from nemo_star.benchmarking.hugging_face import build_llama, timed_generation

    config = parse(BenchmarkConfig, {"compare": ["dense", "transformers"], "model": MODEL})
    model = config.model
    dense, hugging_face = build_contenders(config, model, (ALONE, groups), groups)
    context = [i * i % 100 for i in range(50)]
    encoded = dense.engine.encode(context)
    choose = lambda logits: (int(logits.argmax()), False)  # noqa: E731
    steps = list(dense.engine.generate(encoded, [1], max_tokens=5, choose=choose))
    llama = build_llama(model, hugging_face.weights)
    tokens, marks, kv_bytes = timed_generation(llama, [*context, 1], 5)
    assert tokens == [step.token for step in steps]
    assert len(marks) == 5
    assert kv_bytes == 2 * 2 * 2 * 16 * 4 * 55
    with torch.inference_mode():
        expected = llama(torch.tensor([[*context, 1]])).logits[0, -1]
    assert (steps[0].logits - expected).abs().max() <= 5e-4
