import itertools
import json

import pytest
import torch
from launch import ROOT, run_tool

from nemo_star.benchmarking import kernels, timing
from nemo_star.benchmarking.kernels import Shape

TOOL = ROOT / "tools/benchmark_kernels.py"
SMALL = [
    "--blocks",
    64,
    "--cached",
    300,
    "--partials",
    6,
    "--heads",
    4,
    "--groups",
    2,
    "--channels",
    32,
    "--repeats",
    2,
]


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
            assert row["first_seconds"] > 0
            assert row["host_seconds"] == row["seconds"]  # on CPU
            assert row["tflops" if row["phase"] == "prefill" else "bytes_per_second"] > 0
    assert set(by_shape) == {("prefill", 64, 64), ("prefill", 64, 128), ("decode", 1, 300), ("merge", 1, 6)}
    assert set(by_shape.pop(("merge", 1, 6))) == {"torch"}
    for (phase, *_), measured in by_shape.items():
        assert {"numba", "cpu", "math", "torch:flash", "torch:cudnn"} <= set(measured)
        assert ("copy" in measured) == (phase == "decode")
        assert measured["cpu"]["seconds"] is not None
        assert measured["torch:cudnn"]["withheld"]  # on CPU
    assert "torch:flash" in done.stdout


def test_work_is_counted_by_visible_pairs():
    """4 queries over 6 keys: 3 + 4 + 5 + 6 pairs; two products of 2 * 8 operations for each of 2 heads."""
    shape = Shape(phase="prefill", queries=4, keys=6, heads=2, groups=1, channels=8)
    assert shape.flops == 18 * 2 * 2 * 8 * 2


def test_bytes_are_those_of_the_stored_type():
    """300 keys of 2 groups and 8 dimensions; 6 partial results of 2 heads, out and lse, and their merge."""
    decode = Shape(phase="decode", queries=1, keys=300, heads=4, groups=2, channels=8)
    moved = [decode.bytes_moved(name, torch.bfloat16) for name in ("flash", "triton", "triton:e4m3", "copy")]
    assert moved == [2 * 300 * 2 * 8 * size for size in (2, 2, 1, 4)]
    merge = Shape(phase="merge", queries=1, keys=6, heads=2, groups=2, channels=8)
    assert merge.bytes_moved("torch", torch.bfloat16) == 2 * (6 * 9 * 4 + 8 * 2 + 4)


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


def test_triton_is_measured_over_float8_too(monkeypatch):
    read = []

    class Kernel:
        def decode(self, q, k, v, scale, causal):
            read.append((k.dtype, v.dtype))

    monkeypatch.setattr(kernels, "kernels_that_run", lambda device, dtype: ["flash", "triton"])
    monkeypatch.setattr(kernels, "get_kernel", lambda *_: Kernel())
    shape = Shape(phase="decode", queries=1, keys=8, heads=2, groups=1, channels=8)
    contenders, _ = kernels._kernels(shape, torch.device("cpu"), torch.bfloat16)
    for name in ("flash", "triton", "triton:e4m3", "triton:e5m2"):
        contenders[name]()
    types = [torch.bfloat16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    assert read == [(dtype, dtype) for dtype in types]


def test_both_merges_are_measured_where_both_run(monkeypatch):
    merged = []
    merges = {name: lambda *given, name=name: merged.append((name, *given)) for name in ("torch", "triton")}
    monkeypatch.setattr(kernels, "get_merge", lambda name, device: merges["triton" if name == "auto" else name])
    shape = Shape(phase="merge", queries=1, keys=6, heads=2, groups=1, channels=8)
    contenders, others = kernels._merges(shape, torch.device("cpu"), torch.bfloat16)
    assert list(contenders) == list(others) == ["torch", "triton"]
    for work in (*contenders.values(), *others.values()):
        work()
    assert [(name, outs.shape, lses.shape) for name, outs, lses, *_ in merged] == [
        (name, (6, rows, 1, 2, 8), (6, rows, 1, 2)) for rows in (1, 2) for name in ("torch", "triton")
    ]


def test_a_shape_is_first_called_when_another_length_has_warmed_up():
    said = []
    work, shorter = {"x": lambda: said.append("own")}, {"x": lambda: said.append("shorter")}
    first, withheld = timing.first_calls(work, shorter, torch.device("cpu"))
    assert said == ["shorter", "own"]
    assert first["x"] > 0
    assert not withheld


def test_contenders_run_there_and_back():
    said = []
    timing.in_turn({name: lambda name=name: said.append(name) for name in "ab"}, torch.device("cpu"), repeats=2)
    runs = [name for name, _ in itertools.groupby(said)]
    assert runs == ["a", "b", "a", "b", "a"]  # once for their calls a sample; there; back: b again, then a


def test_events_are_around_several_calls_of_a_busy_device(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, _):
            return 6.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "_keep_busy", lambda device: said.append("busy"))
    seconds, host_seconds = timing.seconds_of(lambda: said.append("call"), torch.device("cuda"), calls=3)
    assert said == ["busy", "event", "call", "call", "call", "event"]
    assert seconds == pytest.approx(2e-3)
    assert 0 < host_seconds < 1
