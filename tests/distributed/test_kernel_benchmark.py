import json

import pytest
from launch import ROOT, run_tool

from nemo_star.benchmarking.kernels import Shape

TOOL = ROOT / "tools/benchmark_kernels.py"
SMALL = ["--blocks", 64, "--cached", 300, "--heads", 4, "--groups", 2, "--channels", 32, "--repeats", 2]


def test_rows_of_all_contenders(tmp_path):
    done = run_tool(TOOL, *SMALL, "--output", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    by_shape = {}
    for row in rows:
        by_shape.setdefault((row["phase"], row["queries"], row["keys"]), {})[row["kernel"]] = row
        if row["seconds"] is None:
            assert row["withheld"]
        else:
            assert row["seconds"] > 0
            assert row["tflops" if row["phase"] == "prefill" else "bytes_per_second"] > 0
    assert set(by_shape) == {("prefill", 64, 64), ("prefill", 64, 128), ("decode", 1, 300)}
    for (phase, *_), kernels in by_shape.items():
        assert {"numba", "cpu", "math", "torch:flash", "torch:cudnn"} <= set(kernels)
        assert ("copy" in kernels) == (phase == "decode")
        assert kernels["cpu"]["seconds"] is not None
        assert kernels["torch:cudnn"]["withheld"]  # on CPU
    assert "torch:flash" in done.stdout


def test_work_is_counted_by_visible_pairs():
    """4 queries over 6 keys: 3 + 4 + 5 + 6 pairs; two products of 2 * 8 operations for each of 2 heads."""
    shape = Shape(phase="prefill", queries=4, keys=6, heads=2, groups=1, channels=8)
    assert shape.flops == 18 * 2 * 2 * 8 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", 5, "--groups", 2], "--heads 5 is not divisible by --groups 2"),
        (["--blocks", 0], "must be at least 1"),
        (["--output", "missing/rows.json"], "does not exist"),
    ],
)
def test_what_is_wrong_is_named_before_the_work(arguments, message):
    done = run_tool(TOOL, *arguments)
    assert done.returncode == 1
    assert message in done.stderr


def test_rows_of_earlier_shapes_outlive_a_failure(tmp_path, monkeypatch):
    from nemo_star.benchmarking import kernels
    from nemo_star.commands.benchmark_kernels import main

    def measured(shape, **_):
        if shape.phase == "decode":
            raise RuntimeError("out of memory")
        return [
            {"phase": shape.phase, "queries": 1, "keys": shape.keys, "kernel": "x", "seconds": None, "withheld": "-"}
        ]

    monkeypatch.setattr(kernels, "measure", measured)
    with pytest.raises(RuntimeError, match="out of memory"):
        main([*map(str, SMALL), "--output", str(tmp_path / "rows.json")])
    assert [row["keys"] for row in json.loads((tmp_path / "rows.json").read_text())] == [64, 128]
