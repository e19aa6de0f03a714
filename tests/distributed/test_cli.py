"""The command line: Hydra's literal values and recipes, --help, the commands' names, one voice, no traces."""

import random
import sys
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from launch import ROOT, run_tool, torchrun
from omegaconf import OmegaConf

from nemo_star.__main__ import COMMANDS
from nemo_star.__main__ import main as nemo_star
from nemo_star.config.benchmark import BenchmarkConfig
from nemo_star.config.compose import CONF, RECIPES, compose, quote, quote_literal
from nemo_star.config.evaluate import EvaluateConfig
from nemo_star.config.fidelity import FidelityConfig
from nemo_star.config.generate import GenerateConfig
from nemo_star.config.gpu_check import GpuCheckConfig
from nemo_star.config.harness import HarnessConfig
from nemo_star.config.help import describe_keys
from nemo_star.config.plan import PlanConfig
from nemo_star.config.serve import ServeConfig
from nemo_star.runtime import locations
from nemo_star.runtime.program import started_as

GENERATE = ROOT / "tools" / "generate.py"
LITERAL = ("checkpoint", "context", "query", "output")


def composed(text):
    """What a quoted value comes to after Hydra's parser and OmegaConf."""
    value = OverridesParser.create().parse_override(f"context={quote(text)}").value()
    return OmegaConf.to_container(OmegaConf.create({"context": value}), resolve=True)["context"]


@pytest.mark.parametrize(
    "text",
    ["Don't (stop), [now] {x: 1}", "123", "null", "", " a ", "a=b", "${x}", r"\${x}", "C:\\dir\\", "\\'", "a\nb", "é€"],
)
def test_text_is_taken_to_the_letter(text):
    assert composed(text) == text


def test_any_text_is_taken_to_the_letter():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("a\\'\"${}:=, ()[]#%\n\té") for _ in range(rng.randint(0, 9)))
        assert composed(text) == text


def test_only_literal_keys_are_quoted():
    assert quote_literal("context=a,b", LITERAL) == "context='a,b'"
    assert quote_literal("++query=x", LITERAL) == "++query='x'"
    assert quote_literal("attention=dense", LITERAL) == "attention=dense"
    assert quote_literal("--cfg", LITERAL) == "--cfg"


def test_recipes_compose():
    of_others = "benchmark plan serve serve_demo evaluate fidelity harness gpu_check gpu_check_tiny".split()
    others = {RECIPES / f"{name}.yaml" for name in of_others}
    for recipe in sorted(set(RECIPES.glob("*.yaml")) - others):
        arguments = ["--config-name", recipe.stem, "checkpoint=somewhere"]
        if not recipe.stem.startswith("demo"):  # those bring their question
            arguments += ["context=a", "query=b"]
        config = compose(GenerateConfig, arguments, tool="generate", literal_keys=LITERAL)
        assert config.checkpoint == "somewhere"


def test_the_recipes_of_the_service_and_of_an_evaluation_compose():
    for recipe in ("serve", "serve_demo"):
        config = compose(ServeConfig, ["--config-name", recipe, "checkpoint=somewhere"], tool="serve")
        assert (config.checkpoint, config.server.host) == ("somewhere", "127.0.0.1")
    config = compose(EvaluateConfig, ["checkpoint=c", "output=o", "block_sizes=[n/4,512]"], tool="evaluate")
    assert config.block_sizes == ("n/4", 512)


def test_the_benchmark_recipe_composes():
    config = compose(BenchmarkConfig, ["compare=[star:shared,ring]", "model.num_layers=2"], tool="benchmark")
    assert config.compare == ("star:shared", "ring")
    assert (config.model.num_layers, config.model.hidden_size) == (2, 512)
    with pytest.raises(ValueError, match="'star:twice' is unknown; known: ring, star:shared"):
        compose(BenchmarkConfig, ["compare=[star:twice]"], tool="benchmark")


def test_groups_and_literals_reach_the_config():
    arguments = ["attention=dense", "attention.block_size=64", "checkpoint=a b=c", "context=(x), y", "query=123"]
    config = compose(GenerateConfig, arguments, tool="generate", literal_keys=LITERAL)
    assert (config.attention.kind, config.attention.block_size) == ("dense", 64)
    assert (config.checkpoint, config.context, config.query) == ("a b=c", "(x), y", "123")


def test_a_recipe_of_ones_own_may_inherit_another(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults:\n  - generate\n  - _self_\ncheckpoint: c\ncontext: a\nquery: b\n")
    arguments = ["--config-dir", str(tmp_path), "--config-name", "mine"]
    assert compose(GenerateConfig, arguments, tool="generate").context == "a"


@dataclass(frozen=True)
class Inner:
    """What is inside."""

    tokens: tuple[int, ...] = (1, 2)
    """Costs $5, or ${x}; None of it is 'quoted'."""
    name: str = "x"


@dataclass(frozen=True)
class Mine:
    """Keys of a command that does not exist."""

    size: int
    """How large."""
    mode: str | None = None
    attention: Inner = field(default_factory=Inner)
    other: Inner | None = None
    """Or nothing."""


def test_help_shows_a_class_as_it_is_written():
    assert describe_keys(Mine, groups=CONF).splitlines() == [
        f"{'size=int':<58} required",
        "    How large.",
        f"{'mode=text|null':<58} default: null",
        "attention=dense|ring|star|summary|ulysses",
        "    What is inside.",
        f"{'attention.tokens=[int,...]':<58} default: [1,2]",
        "    Costs $5, or ${x}; null of it is 'quoted'.",
        f"{'attention.name=text':<58} default: x",
        "other.*",
        "    Or nothing.",
        f"{'other.tokens=[int,...]':<58} default: [1,2]",
        "    Costs $5, or ${x}; null of it is 'quoted'.",
        f"{'other.name=text':<58} default: x",
    ]


def test_a_new_field_is_in_the_help_without_further_work(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/nemo-star", "generate"])
    with pytest.raises(SystemExit) as done:
        compose(Mine, ["--help"], tool="generate")
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert describe_keys(Mine, groups=CONF) in shown
    assert "\n  nemo-star generate [" in shown
    assert "torchrun --nproc-per-node N -m nemo_star generate [" in shown


@pytest.mark.parametrize(
    "config",
    [GenerateConfig, BenchmarkConfig, PlanConfig, EvaluateConfig, FidelityConfig, HarnessConfig, GpuCheckConfig],
)
def test_every_key_has_a_docstring(config):
    lines = describe_keys(config, groups=CONF).splitlines()
    bare = [
        line.partition("=")[0]
        for line, below in pairwise([*lines, ""])
        if not line.startswith(" ") and not below.startswith(" ")
    ]
    assert bare == []


def test_usage_is_how_the_process_was_started(monkeypatch):
    for script, expected in [
        ("/usr/bin/nemo-star", ("nemo-star plan", "-m nemo_star plan")),
        ("/lib/nemo_star/__main__.py", ("python -m nemo_star plan", "-m nemo_star plan")),
        ("tools/plan.py", ("python tools/plan.py", "tools/plan.py")),
    ]:
        monkeypatch.setattr(sys, "argv", [script])
        assert started_as("plan") == expected


def test_the_commands_are_listed_and_unknown_ones_refused(capsys):
    for arguments in ([], ["--help"]):
        assert nemo_star(arguments) == 0
        listed = [
            line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ") and line[2] != " "
        ]
        assert listed == list(COMMANDS)
    with pytest.raises(ValueError, match="unknown command 'generat'; known: generate, chat, serve, convert"):
        nemo_star(["generat"])


def test_no_command_imports_what_is_heavy_before_it_runs():
    program = (
        "import importlib, sys; from nemo_star.__main__ import COMMANDS\n"
        "for name in COMMANDS: importlib.import_module('nemo_star.commands.' + name.replace('-', '_')).main\n"
        "sys.exit(str({'torch', 'megatron', 'transformers'} & set(sys.modules) or 0))"
    )
    done = run_tool("-c", program)
    assert done.stderr == "0\n"


def test_an_unknown_command_is_one_line(tmp_path):
    done = run_tool("-m", "nemo_star", "nonsense", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown command 'nonsense'; known: generate, ")


def test_the_demo_s_files_are_only_in_a_checkout(monkeypatch):
    monkeypatch.setattr("nemo_star.config.compose.checkout", lambda: None)
    with pytest.raises(ValueError, match="^checkpoint: this recipe names files of a checkout"):
        compose(GenerateConfig, ["--config-name", "demo"], tool="generate")
    monkeypatch.undo()
    found = compose(GenerateConfig, ["--config-name", "demo"], tool="generate")
    assert found.context_file == str(locations.checkout() / "assets/demo_document.txt")


def test_help_and_cfg_print_once_and_leave_nothing(tmp_path):
    shown = torchrun(2, GENERATE, "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("Answer questions about long contexts") == 1
    assert shown.stdout.count("parallel.timeout_minutes=float") == 1
    shown = torchrun(2, "-m", "nemo_star", "generate", "--cfg", "job", "checkpoint=c", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("checkpoint: c") == 1
    assert yaml.safe_load(shown.stdout)["attention"]["kind"] == "star"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["nonsense=1"], "Key 'nonsense' is not in struct"),
        (["attention.block_size=8", "attention.anchor_size=9"], "anchor_size=9 is larger than attention.block_size=8"),
    ],
)
def test_an_error_is_printed_once_and_every_rank_fails(tmp_path, overrides, message):
    done = torchrun(2, GENERATE, "checkpoint=c", "context=a", "query=b", *overrides, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count(message) == 1
    assert "exitcode: 0" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_torchrun_an_error_is_one_line(tmp_path):
    done = run_tool(GENERATE, "checkpoint=missing", "context=a", "query=b", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: checkpoint missing does not exist or is not a directory\n"
