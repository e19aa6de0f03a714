"""Hydra's side of the tools: literal values, recipes, one voice, no traces."""

import random

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from launch import ROOT, run_tool, torchrun
from omegaconf import OmegaConf

from nemo_star.config.benchmark import BenchmarkConfig
from nemo_star.config.compose import RECIPES, compose, quote, quote_literal
from nemo_star.config.generate import GenerateConfig

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
    for recipe in sorted(set(RECIPES.glob("*.yaml")) - {RECIPES / "benchmark.yaml", RECIPES / "plan.yaml"}):
        arguments = ["--config-name", recipe.stem, "checkpoint=somewhere"]
        if not recipe.stem.startswith("demo"):  # those bring their question
            arguments += ["context=a", "query=b"]
        config = compose(GenerateConfig, arguments, tool="generate", literal_keys=LITERAL)
        assert config.checkpoint == "somewhere"


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


def test_help_and_cfg_print_once_and_leave_nothing(tmp_path):
    shown = torchrun(2, GENERATE, "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("Answer questions about long contexts") == 1
    shown = torchrun(2, GENERATE, "--cfg", "job", "checkpoint=c", cwd=tmp_path)
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
