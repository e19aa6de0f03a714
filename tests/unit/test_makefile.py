"""`make install` and the Python that it is for."""

import shutil
import subprocess

import pytest
from launch import ROOT

STUB = """#!/bin/sh
echo "VERSION $@" >> "$LOG"
case "$1 $2" in
  "-c "*) echo VERSION ;;
  "-m venv") rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
esac
"""
"""A Python of some version, which notes how it is called and makes environments of itself."""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def install(tmp_path):
    """install(version) -> the calls that `make install PYTHON=<a Python of this version>` made."""

    def run(version):
        python, log = tmp_path / f"python{version}", tmp_path / "log"
        python.write_text(STUB.replace("VERSION", version))
        python.chmod(0o755)
        log.write_text("")
        command = ["make", "install", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
        environment = {"PATH": "/usr/bin:/bin", "LOG": str(log)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        return [line for line in log.read_text().splitlines() if " -c " not in line]

    return run


def test_an_environment_of_another_python_is_made_anew(install):
    venv, *packages = install("3.11")
    assert venv.startswith("3.11 -m venv --clear")
    assert packages
    assert all(line.startswith("3.11 -m pip install") for line in packages)
    assert install("3.11") == []
    venv, *packages = install("3.12")
    assert venv.startswith("3.12 -m venv --clear")
    assert packages
    assert all(line.startswith("3.12 -m pip install") for line in packages)
    assert install("3.11")[0].startswith("3.11 -m venv --clear")


def test_a_python_that_does_not_run_is_refused(tmp_path):
    command = ["make", "install", f"PYTHON={tmp_path / 'none'}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"PYTHON={tmp_path / 'none'} does not run" in done.stderr
    assert not (tmp_path / "venv").exists()
