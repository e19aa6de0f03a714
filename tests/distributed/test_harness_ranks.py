"""lm-evaluation-harness with this engine on two ranks, in one launch: the layouts, errors, and the tool."""

import json

import pytest
from launch import ROOT, forked, run_tool

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'nemo-star[harness]'")

from harness_tasks import ask, asked, same, write_tasks

ATTENTION = {"kind": "star", "block_size": 32}
LAYOUTS = {"cp": {}, "dp": {"context_parallel_size": 1}}


@pytest.fixture(scope="module")
def launched(demo, tmp_path_factory):
    """(report of each rank, standard output, folder of the tool's results)."""
    folder = tmp_path_factory.mktemp("harness")
    tasks = folder / "tasks"
    tasks.mkdir()
    write_tasks(tasks)
    command = [
        f"checkpoint={demo}",
        "tasks=[needle,choi*]",
        f"include_path={tasks}",
        "include_defaults=false",
        "attention.block_size=128",
        f"output={folder / 'results'}",
    ]
    requests = {
        "checkpoint": str(demo),
        "attention": ATTENTION,
        "layouts": LAYOUTS,
        "commands": [command],
        "cache": str(folder / "cache"),
    }
    (folder / "requests.json").write_text(json.dumps(requests))
    done = forked(2, ROOT / "tests/workers/harness_ranks.py", folder / "requests.json", folder / "report.json")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text()), done.stdout, folder / "results"


@pytest.fixture(scope="module")
def alone(demo):
    from nemo_star.evaluation.harness.model import NemoStar
    from nemo_star.llm.front import LLM

    found = ask(NemoStar(LLM(demo, attention=ATTENTION)), asked())
    return json.loads(json.dumps(found))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_give_the_results_of_one(launched, alone, layout):
    (first, _), (second, _) = launched[0]
    found = {
        method: [tuple(one) if isinstance(one, list) else one for one in of] for method, of in first[layout].items()
    }
    assert same(found, alone)
    assert second[layout] is None


def test_an_error_on_rank_0_is_one_on_all_ranks(launched):
    (_, first), (_, second) = launched[0]
    assert first["refused"] == second["refused"]
    assert first["refused"].startswith("ValueError: generation_kwargs: beams=2 is not implemented")
    assert first["broken"].startswith("ZeroDivisionError")
    assert second["broken"] == "ValueError: rank 0: ZeroDivisionError: division by zero"


def test_the_tool_reports_once_and_writes_the_harness_s_files(launched):
    _, printed, results = launched
    (file,) = results.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"]["needle"]["exact_match,strip"] == 1
    assert found["results"]["choice"]["acc,none"] == 1
    assert found["config"]["attention"]["block_size"] == 128
    assert found["config"]["layout"] == {"tp": 1, "cp": 2, "pp": 1, "dp": 1}
    assert len(list(results.rglob("samples_*.jsonl"))) == 2
    assert printed.count("|needle|") == printed.count("|choice|") == 1


@pytest.mark.slow
def test_tasks_that_do_not_exist_are_one_line(demo, tmp_path):
    done = run_tool(ROOT / "tools/harness.py", f"checkpoint={demo}", "tasks=[no_such]", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: tasks: lm-evaluation-harness has no 'no_such'")
