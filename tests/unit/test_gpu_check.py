"""tools/gpu_check.py on made-up steps: order, limits, failures, signals, kills, going on; its recipes and tables."""

import json
import os
import re
import select
import signal
import subprocess
import sys

import psutil
import pytest
from launch import ROOT, SUPPORT
from made_up_steps import ABOUT, carry_out_these

from nemo_star.benchmarking.gpu_check import processes
from nemo_star.benchmarking.gpu_check import run as running
from nemo_star.benchmarking.gpu_check.ledger import locked
from nemo_star.benchmarking.gpu_check.processes import GRACE_SECONDS, MARK, run_limited
from nemo_star.benchmarking.gpu_check.results import DECODE, KERNELS, MODELS, TESTS, TEXT
from nemo_star.benchmarking.gpu_check.run import carry_out, run
from nemo_star.benchmarking.gpu_check.steps import Step, planned
from nemo_star.commands.benchmark_kernels import parse_arguments
from nemo_star.config.benchmark import BenchmarkConfig
from nemo_star.config.compose import compose
from nemo_star.config.gpu_check import GpuCheckConfig
from nemo_star.runtime import machine

LONG = 300
"""Seconds: a limit that no step here meets."""
SAYS = "print('said')"


def results(folder):
    """(record by name, everything)."""
    whole = json.loads((folder / "results.json").read_text())
    return {record["name"]: record for record in whole["steps"]}, whole


def states(folder):
    return {name: record["state"] for name, record in results(folder)[0].items()}


def counting(file, then=SAYS):
    """Code that notes that it runs."""
    return f"open({str(file)!r}, 'a').write('.'); {then}"


def runs(file):
    return len(file.read_text()) if file.exists() else 0


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(tmp_path, capsys):
    order = tmp_path / "order"
    note = lambda letter: f"open({str(order)!r}, 'a').write({letter!r})"  # noqa: E731
    made_up = [
        ("good", f"{note('a')}; {SAYS}", LONG),
        ("bad", f"{note('b')}; print('so far'); raise SystemExit('went wrong')", LONG),
        ("dies", f"{note('c')}; import os; os.kill(os.getpid(), 9)", LONG),
        ("mute", note("d"), LONG),
        ("last", f"{note('e')}; {SAYS}", LONG),
    ]
    assert carry_out_these(tmp_path / "out", made_up) == 1
    assert order.read_text() == "abcde"
    records, whole = results(tmp_path / "out")
    assert list(records) == ["good", "bad", "dies", "mute", "last"]
    assert states(tmp_path / "out") == dict(zip(records, ["done", "failed", "failed", "failed", "done"], strict=True))
    assert [records[name]["reason"] for name in records] == [
        None,
        "exit code 1",
        "ended by SIGKILL",
        "it left no rows",
        None,
    ]
    assert records["bad"]["log_tail"] == ["so far", "went wrong"]
    assert records["bad"]["rows"] == [{"text": "so far"}, {"text": "went wrong"}]
    assert whole["about"] == records["good"]["about"] == ABOUT
    report = (tmp_path / "out/results.md").read_text()
    for wanted in ("# GPU check: a machine", "## bad", "**Failed** after", "exit code 1; commit abc; a machine; 2"):
        assert wanted in report
    assert "    python -c " in report
    assert re.search(r"Done in \d+ s; commit abc; a machine; \d{4}-\d\d-\d\d\.", report)
    assert "[5/5] last" in capsys.readouterr().out


def test_a_step_over_its_limit_is_ended_and_what_it_had_is_read(tmp_path):
    pauses = "import signal; signal.pause()"
    assert carry_out_these(tmp_path, [("slow", pauses, 0.5), ("next", SAYS, LONG)]) == 1
    records, _ = results(tmp_path)
    assert (records["slow"]["state"], records["slow"]["reason"]) == ("timed out", "exceeded its limit of 0.5 s")
    assert records["slow"]["exit_code"] is None
    assert records["next"]["state"] == "done"


def test_all_that_a_step_started_is_ended(tmp_path, monkeypatch):
    """Processes that ignore SIGTERM, one of them in a session of its own, as torchrun's ranks are."""
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    pid_file = tmp_path / "pids"
    child = (
        "import os, signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(pid_file)!r}, 'a').write(str(os.getpid()) + ' ')\nsignal.pause()"
    )
    code = (
        "import subprocess, sys\n"
        f"for apart in (False, True): subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=apart)\n"
        f"exec({child!r})"
    )
    three = lambda: pid_file.exists() and pid_file.read_text().count(" ") == 3  # noqa: E731
    ended = run_limited(
        [sys.executable, "-c", code],
        "all-of-it",
        log=tmp_path / "log",
        environment=dict(os.environ),
        limit_seconds=LONG,
        is_stopped=three,
    )
    assert (ended.state, ended.reason) == ("interrupted", "interrupted")
    assert [is_alive(int(pid)) for pid in pid_file.read_text().split()] == [False] * 3


def test_what_a_good_step_leaves_running_is_ended(tmp_path):
    pid_file = tmp_path / "pid"
    code = (
        "import subprocess, sys; left = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(left.pid)); print('said')"
    )
    assert carry_out_these(tmp_path / "out", [("leaves", code, LONG)]) == 0
    assert not is_alive(int(pid_file.read_text()))


def test_a_second_call_goes_on_with_what_is_not_done(tmp_path):
    good, bad, flag = tmp_path / "good", tmp_path / "bad", tmp_path / "flag"
    fails = f"import os, sys; {SAYS}; sys.exit(not os.path.exists({str(flag)!r}))"
    made_up = [("good", counting(good), LONG), ("bad", counting(bad, fails), LONG)]
    assert carry_out_these(tmp_path / "out", made_up) == 1
    flag.touch()
    assert carry_out_these(tmp_path / "out", made_up) == 0
    assert (runs(good), runs(bad)) == (1, 2)
    assert "log_tail" not in results(tmp_path / "out")[0]["bad"]
    assert carry_out_these(tmp_path / "out", made_up) == 0
    assert (runs(good), runs(bad)) == (1, 2)


def test_another_commit_or_command_is_measured_again_and_what_was_there_kept(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    made_up = [("first", counting(first), LONG), ("second", counting(second), LONG)]
    assert carry_out_these(tmp_path / "out", made_up) == 0
    made_up[1] = ("second", counting(second, "print('otherwise')"), LONG)
    assert carry_out_these(tmp_path / "out", made_up) == 0
    assert (runs(first), runs(second)) == (1, 2)
    # Another limit is no other measurement.
    made_up[1] = (*made_up[1][:2], LONG + 1)
    assert carry_out_these(tmp_path / "out", made_up) == 0
    assert (runs(first), runs(second)) == (1, 2)
    assert carry_out_these(tmp_path / "out", made_up, {**ABOUT, "commit": "def"}) == 0
    assert (runs(first), runs(second)) == (2, 3)
    earlier = [(record["name"], record["about"]["commit"]) for record in results(tmp_path / "out")[1]["earlier"]]
    assert earlier == [("second", "abc"), ("first", "abc"), ("second", "abc")]


def test_rows_of_an_earlier_run_are_not_taken_for_this_one_s(tmp_path):
    step = Step("rows", ("-c", SAYS, "{output}"), LONG, KERNELS)
    (tmp_path / "rows.json").write_text('[{"phase": "old"}]')
    assert carry_out([step], [step], tmp_path, about=ABOUT, environment=dict(os.environ)) == 1
    record = results(tmp_path)[0]["rows"]
    assert (record["rows"], record["reason"]) == ([], "it left no rows")
    assert record["command"] == ["python", "-c", SAYS, "rows.json"]


def test_only_what_is_asked_for_runs(tmp_path):
    steps = [Step(name, ("-c", SAYS), LONG, TEXT) for name in "abc"]
    assert carry_out(steps, steps[1:2], tmp_path, about=ABOUT, environment=dict(os.environ)) == 0
    assert states(tmp_path) == {"a": "not begun", "b": "done", "c": "not begun"}
    # Steps of other sizes take the place of those that were not begun.
    other = [Step("d", ("-c", SAYS), LONG, TEXT), steps[1]]
    assert carry_out(other, other[1:], tmp_path, about=ABOUT, environment=dict(os.environ)) == 0
    assert states(tmp_path) == {"d": "not begun", "b": "done"}


@pytest.fixture
def under_way(tmp_path):
    """(the worker in its second step of three, that step's process id, the steps, the folder)."""
    pipe, folder = tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(pipe)
    # The first time it pauses: the pipe is gone the second time.
    code = (
        f"import os, signal; print('begun')\nif os.path.exists({str(pipe)!r}):\n"
        f"    open({str(pipe)!r}, 'w').write(str(os.getpid()))\n    signal.pause()"
    )
    made_up = [("a", counting(tmp_path / "a"), LONG), ("b", code, LONG), ("c", SAYS, LONG)]
    worker = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/workers/gpu_check_steps.py"), str(folder), json.dumps(made_up)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert select.select([reader], [], [], LONG)[0], "the second step has not begun"
        child = int(os.read(reader, 100))
        pipe.unlink()
        yield worker, child, made_up, folder
    finally:
        os.close(reader)
        worker.kill()
        worker.wait()


def test_killed_in_the_middle_and_resumed(under_way, tmp_path):
    worker, child, made_up, folder = under_way
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert states(folder) == {"a": "done", "b": "running", "c": "not begun"}
    assert is_alive(child)
    assert carry_out_these(folder, made_up) == 0
    assert not is_alive(child)
    assert states(folder) == {"a": "done", "b": "done", "c": "done"}
    assert runs(tmp_path / "a") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_the_check(under_way, number):
    worker, child, _, folder = under_way
    os.kill(worker.pid, number)
    assert worker.wait() == 130
    assert not is_alive(child)
    assert states(folder) == {"a": "done", "b": "interrupted", "c": "not begun"}
    record = results(folder)[0]["b"]
    assert (record["rows"], record["exit_code"]) == ([{"text": "begun"}], None)
    assert "**Interrupted** after" in (folder / "results.md").read_text()


def test_a_folder_is_one_check_s_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="is being filled by another gpu-check"):
        carry_out_these(tmp_path, [("a", SAYS, LONG)])
    assert carry_out_these(tmp_path, [("a", SAYS, LONG)]) == 0


def test_results_that_are_none_are_refused(tmp_path):
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"results.json was not written by gpu-check .* give another output=FOLDER"):
        carry_out_these(tmp_path, [("a", SAYS, LONG)])
    assert (tmp_path / "results.json").read_text() == "[]"


def test_tests_are_counted_as_pytest_counts_them(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_good(x): pass\n"
        "def test_bad(): assert False\n"
        "def test_skipped(): pytest.skip('PASSED')\n"
        "def test_error(broken): pass\n"
    )
    command = ("-m", "pytest", "-v", "-o", "console_output_style=classic", "-p", "no:cacheprovider", str(tmp_path))
    step = Step("tests", command, LONG, TESTS)
    assert carry_out([step], [step], tmp_path / "out", about=ABOUT, environment=dict(os.environ)) == 1
    rows = results(tmp_path / "out")[0]["tests"]["rows"]
    outcomes = [row["outcome"] for row in rows]
    assert {name: outcomes.count(name) for name in outcomes} == {"passed": 2, "failed": 1, "skipped": 1, "error": 1}
    log = (tmp_path / "out/tests.log").read_text()
    assert "1 failed, 2 passed, 1 skipped, 1 error" in log
    assert "| 2 | 1 | 1 | 1 |" in TESTS.markdown(rows)
    assert any(line.startswith("- failed: `") and line.endswith("::test_bad`") for line in TESTS.markdown(rows))


def test_tests_that_were_all_skipped_are_no_success():
    rows = TESTS.read(None, "tests/gpu/test_gpu.py::test_x[te] SKIPPED (needs 1 CUDA device(s))\n")
    assert rows == [{"test": "tests/gpu/test_gpu.py::test_x[te]", "outcome": "skipped"}]
    assert TESTS.problem(rows) == "of 1 tests none ran and passed"


MEASURED = {
    "kind": "star:shared",
    "kernel": "prefill te, decode flash",
    "context_tokens": 131072,
    "withheld": None,
    "prefill_seconds": 2.0,
    "prefill_flops": 100,
    "first_token_seconds": 0.02,
    "decode_seconds_per_token": 0.01,
    "decode_attention_seconds": 0.003,
    "kv_read_seconds": 0.002,
    "peak_memory_bytes": 2**30,
    "first_round": {"prefill_seconds": 5.0, "first_token_seconds": 0.5, "decode_seconds_per_token": 0.04},
}
SLOWER = {**MEASURED, "kind": "dense", "prefill_seconds": 3.0, "prefill_flops": 140}
WITHHELD = {"kind": "dense", "context_tokens": 524288, "withheld": "does not fit into GPU 0 |\n of host"}


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_first_round_stands_apart_in_the_tables_of_models():
    titles, rule, first, second, none = map(cells, MODELS.markdown([MEASURED, SLOWER, WITHHELD]))
    assert len(titles) == len(rule) == len(first) == len(none)
    row = dict(zip(titles, first, strict=True))
    assert (row["prefill s"], row["first prefill s"], row["first token ms"]) == ("2.000", "5.000", "500.000")
    assert (row["decode ms a token"], row["over the read"], row["peak GiB"]) == ("10.000", "1.50", "1.00")
    row = dict(zip(titles, second, strict=True))
    assert (row["times"], row["FLOPs"]) == ("1.50", "1.40")
    assert none[:4] == ["dense", "", "524,288", "withheld: does not fit into GPU 0 \\| of host"]
    titles, _, first, none = map(cells, DECODE.markdown([MEASURED, WITHHELD]))
    row = dict(zip(titles, first, strict=True))
    assert (row["first: token 1 ms"], row["first: ms a token"]) == ("500.000", "40.000")
    assert (row["token 1 ms"], row["ms a token"], row["kernels"]) == ("20.000", "10.000", "prefill te, decode flash")
    assert none[3].startswith("withheld: ")


def recipe(*arguments):
    return compose(GpuCheckConfig, arguments, tool="gpu_check", literal_keys=("output",))


def test_the_recipe_takes_at_most_25_minutes_and_its_commands_are_the_tools_own():
    steps = planned(recipe())
    assert sum(step.limit_seconds + GRACE_SECONDS for step in steps) <= 25 * 60
    commands = {step.name: list(step.command) for step in steps}
    assert list(commands) == [
        "doctor",
        "tests",
        "kernels",
        "model_32768",
        "model_131072",
        "model_524288",
        "decode_kernels",
        "decode_model",
    ]
    assert commands["tests"][-2:] == ["-m", "gpu"]
    given = parse_arguments(commands["kernels"][3:])
    assert (given.blocks, given.cached, given.output) == ([8192, 32768], [], "{output}")
    given = parse_arguments(commands["decode_kernels"][3:])
    assert (given.blocks, given.cached) == ([], [131072, 524288, 1048576])
    for name, layers, tokens in (
        ("model_131072", 32, (131072,)),
        ("model_524288", 8, (524288,)),
        ("decode_model", 8, (131072, 524288)),
    ):
        arguments = commands[name][commands[name].index("benchmark") + 1 :]
        config = compose(BenchmarkConfig, arguments, tool="benchmark", literal_keys=("output",))
        assert (config.model.num_layers, config.model.hidden_size, config.attention.block_size) == (layers, 4096, 32768)
        assert config.context_tokens == tokens
        assert config.compare[-1] == "star:shared+steps:graph+linears:torch"
        assert config.output == "{output}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=[doctor,kernel]"], "steps: 'kernel' is unknown; known: doctor, tests, kernels, model_32768"),
        (
            ["context_tokens=[64]", "repeats=[1]", "layers=[2]"],
            r"limits has none for step model_64: give \+limits.model_64=SECONDS",
        ),
        (["repeats=[1]"], "repeats has 1 numbers for 3 context_tokens"),
        (["layers=[1,2]"], "layers has 2 numbers for 3 context_tokens"),
        (["limits.doctor=0"], "limits.doctor=0.0 must be above 0 seconds"),
        (["compare=[star:twice]"], "'star:twice' is unknown"),
        (["cached=[0]"], r"cached=\[0\]: give at least one"),
        (["steps=[doctor]"], "no CUDA device is found"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(overrides, message, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "examine", lambda environment: {**ABOUT, "gpus": 0})
    with pytest.raises(ValueError, match=message):
        run(recipe(*overrides, f"output={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("found", "options"), [("2.20.2", "+linears:torch"), ("absent", "")])
def test_without_transformer_engine_its_option_is_left_out(found, options, tmp_path, monkeypatch):
    """The benchmark refuses it there, and with it all that would run beside it."""
    ran = []
    monkeypatch.setattr(running, "examine", lambda environment: {**ABOUT, "gpus": 1, "transformer_engine": found})
    monkeypatch.setattr(running, "carry_out", lambda steps, *_, **__: ran.extend(steps) or 0)
    run(recipe(f"output={tmp_path / 'out'}"))
    words = {step.name: word for step in ran for word in step.command if word.startswith("compare=")}
    assert words["model_131072"] == f"compare=[dense,star:recompute,star:shared,star:shared+steps:graph{options}]"
    between = "star:shared+linears:torch," if options else ""
    assert words["decode_model"] == f"compare=[star:shared,{between}star:shared+steps:graph{options}]"


def test_the_driver_is_read_where_there_is_no_nvidia_smi(tmp_path, monkeypatch):
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\nGCC version: 11.4.0\n"
    )
    monkeypatch.setattr(machine, "_DRIVER", file)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._driver() == "550.54.15"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 570.86\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert machine._driver() == "570.86"


@pytest.mark.slow
def test_the_tiny_recipe_killed_and_resumed(tmp_path):
    """Real steps on CPU: SIGKILL in the third, then the rest."""
    command = [sys.executable, str(ROOT / "tools/gpu_check.py"), "--config-name", "gpu_check_tiny"]
    command.append(f"output={tmp_path}")
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in killed.stdout:
        if line.startswith("[3/7] kernels"):
            break
    killed.kill()
    killed.wait()
    before, _ = results(tmp_path)
    wanted = ["done", "done", "running", "not begun"]
    assert [before[name]["state"] for name in ("doctor", "tests", "kernels", "model_96")] == wanted
    resumed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "[1/7] doctor: is done" in resumed.stdout
    records, _ = results(tmp_path)
    assert set(states(tmp_path).values()) == {"done"}
    assert records["doctor"] == before["doctor"]
    assert {row["keys"] for row in records["decode_kernels"]["rows"]} == {300, 600}
    assert [row["kind"] for row in records["model_160"]["rows"]] == ["dense", "star:recompute", "star:shared"]
    assert MARK not in (tmp_path / "results.json").read_text()
