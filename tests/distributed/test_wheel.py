"""The project as a wheel: built without a network, complete, and at work outside of a checkout."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from launch import ROOT, run_tool

FOLDERS = {"nemo_star": "nemo_star", "recipes": "nemo_star/recipes", "conf": "nemo_star/conf"}
"""Folder of the checkout -> its place in the wheel."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves files beside its sources, and takes old ones from there."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder to be found before the checkout, with the wheel's content."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_a_wheel_holds_the_package_its_recipes_and_groups(wheel):
    expected = {
        f"{place}/{file.relative_to(ROOT / folder)}"
        for folder, place in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {"nemo_star/py.typed", "nemo_star/planning/published.yaml"} < expected
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "nemo-star = nemo_star.__main__:run" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_the_installed_commands_find_their_recipes(installed, tmp_path):
    run = lambda *arguments: run_tool(*arguments, packages=installed, cwd=tmp_path)  # noqa: E731
    shown = run("-m", "nemo_star", "plan", "--cfg", "job", "machine=a100")
    assert yaml.safe_load(shown.stdout)["machine"]["name"] == "a100", shown.stderr
    shown = run("-m", "nemo_star", "generate", "--help")
    assert "python -m nemo_star generate [" in shown.stdout, shown.stderr
    assert "Tokens of one context block" in shown.stdout
    shown = run("-m", "nemo_star", "plan", "validate=true")
    assert "Median absolute error" in shown.stdout, shown.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_installed_package_knows_that_it_is_no_checkout(installed, tmp_path):
    program = (
        "import json, nemo_star.config.compose as compose\n"
        "from nemo_star.commands.doctor import requirements\n"
        "from nemo_star.runtime.machine import machine\n"
        "print(json.dumps([str(compose.RECIPES), requirements(), machine()['commit']]))"
    )
    done = run_tool("-c", program, packages=installed, cwd=tmp_path)
    recipes, requirements, commit = json.loads(done.stdout)
    assert recipes == str(installed / "nemo_star/recipes")
    assert any(line.startswith("torch>=") for line in requirements)
    assert not any("extra" in line for line in requirements)
    assert commit is None
