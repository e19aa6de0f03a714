"""Recipes of public models: the plan that each one names fits the machine that it names."""

import dataclasses
import re
import shlex

import pytest
from launch import ROOT

from nemo_star.config.compose import compose
from nemo_star.config.generate import GenerateConfig
from nemo_star.config.plan import PlanConfig
from nemo_star.planning.plan import plan_rows

PLANNED = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml") if "#   nemo-star plan" in file.read_text())


def test_there_are_recipes():
    assert len(PLANNED) >= 12


@pytest.mark.parametrize("name", PLANNED)
def test_a_recipe_fits_the_machine_that_it_names(name):
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 30
    command = re.search(r"nemo-star plan ((?:.*\\\n)*.*)", text).group(1).replace("\\\n#", " ")
    planned = compose(PlanConfig, shlex.split(command), tool="plan", literal_keys=())
    recipe = compose(
        GenerateConfig,
        ["--config-name", name, "checkpoint=DIR", "context=a", "query=b"],
        tool="generate",
        literal_keys=("checkpoint", "context", "query"),
    )
    assert planned.world_size == int(re.search(r"--nproc-per-node (\d+) .* --config-name (\S+)", text).group(1))
    assert planned.attention.block_size == recipe.attention.block_size == recipe.attention.anchor_size
    for field in dataclasses.fields(recipe.parallel):
        assert getattr(planned.parallel, field.name) == getattr(recipe.parallel, field.name)
    machine = re.search(r"on (\d+) (\S+)\.\n", text)
    assert (int(machine.group(1)), machine.group(2).lower()) == (planned.world_size, planned.machine.name)
    star = next(row for row in plan_rows(planned) if row["kind"] == "star:shared")
    assert star["error"] is None
    assert star["fits"], f"{star['peak_memory_bytes'] / 2**30:.0f} GiB a rank"
    length = int(re.search(r"contexts of (\d+)K tokens", text).group(1)) * 1024
    assert planned.context_tokens == length
