"""Broken and mistaken packages around Megatron: named, and no hindrance."""

import sys

import pytest
from launch import ROOT, read_jsonl, run_tool, torchrun, write_jsonl

from nemo_star.commands import doctor
from nemo_star.runtime.transformer_engine import find_transformer_engine, is_loaded, prepare_imports, unrelated_apex

MISSING = "libtransformer_engine.so: cannot open shared object file"


def package(folder, name, text, version=None):
    """A package of one file, with a distribution's metadata where it has a version."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    if version:
        (folder / f"{name}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A Transformer Engine without its core library, and a package called apex that is not NVIDIA's."""
    folder = tmp_path_factory.mktemp("packages")
    package(folder, "transformer_engine", f"raise OSError({MISSING!r})", "2.20.2")
    package(folder, "apex", "", "0.9.10.dev0")
    return folder


@pytest.fixture
def clean_modules(monkeypatch, tmp_path):
    """Neither package imported nor hidden, a folder for packages found first; afterwards all as it was."""
    names = ("transformer_engine", "transformer_engine_torch", "apex")
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}
    for name in ours:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[name]
    sys.modules.update(ours)


def test_the_tools_run_beside_them_and_say_so_once(broken, tiny, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": 1, "context_ids": [*range(40)], "query_ids": [1, 2]}])
    settings = [f"checkpoint={tiny}", f"input={source}", f"output={tmp_path / 'out.jsonl'}"]
    done = torchrun(2, ROOT / "tools/generate.py", *settings, "inference.tokens_to_generate=2", packages=broken)
    assert done.returncode == 0, done.stderr
    assert len(read_jsonl(tmp_path / "out.jsonl")[0]["token_ids"]) == 2
    told = f"Transformer Engine 2.20.2 is installed but not used: its import fails with OSError: {MISSING}"
    assert done.stderr.count(told) == 1
    assert done.stderr.count("apex 0.9.10.dev0 is not NVIDIA Apex but PyPI's unrelated one") == 1
    assert "pip uninstall apex" in done.stderr
    assert "kernel numba" in done.stderr


def test_the_doctor_names_them_and_says_that_the_project_runs(broken):
    done = run_tool(ROOT / "tools/doctor.py", packages=broken)
    assert done.returncode == 0, done.stderr
    lines = {line[:20].strip(): line[21:] for line in done.stdout.splitlines()}
    assert "PyPI's unrelated one" in lines["Apex"]
    assert MISSING in lines["Transformer Engine"]
    assert "pip install --no-build-isolation 'transformer-engine[pytorch]'" in lines["Transformer Engine"]
    assert lines["Megatron-core"][0].isdigit()
    assert "attention kernel " in lines["will run"]
    assert lines["will run"].endswith("; cache.dtype=fp8_e4m3 (converted for numba)")


def test_the_doctor_fails_where_the_project_cannot_run(tmp_path):
    (tmp_path / "megatron").mkdir()
    package(tmp_path / "megatron", "core", "raise RuntimeError('half a Megatron')")
    done = run_tool(ROOT / "tools/doctor.py", packages=tmp_path)
    assert done.returncode == 1
    assert "PROBLEM: RuntimeError: half a Megatron" in done.stdout


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (None, "PROBLEM: not installed, and megatron-core>=0.16.1,<0.20 is needed: make install"),
        ("0.15.0", "PROBLEM: 0.15.0 is installed, and megatron-core>=0.16.1,<0.20 is needed: make install"),
    ],
)
def test_the_doctor_checks_versions(monkeypatch, clean_modules, version, told):
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: version if name == "megatron-core" else real(name))
    (finding,) = [finding for finding in doctor.examine() if finding.about == "megatron-core"]
    assert told in str(finding)


def test_nothing_installed_is_nothing_said(clean_modules, capsys):
    if find_transformer_engine().state != "absent" or unrelated_apex():
        pytest.skip("Transformer Engine or an apex is installed here")
    prepare_imports()
    assert capsys.readouterr().err == ""


def test_a_missing_torch_extension_is_a_broken_transformer_engine(clean_modules):
    package(clean_modules, "transformer_engine", "__version__ = '2.20.2'", "2.20.2")
    pytorch = "raise FileNotFoundError('Could not find shared object file for Transformer Engine torch lib.')"
    package(clean_modules / "transformer_engine", "pytorch", pytorch)
    found = find_transformer_engine()
    assert found.state == "broken"
    assert "FileNotFoundError: Could not find shared object file" in found.told()


def test_what_a_failed_import_left_behind_is_hidden_too(clean_modules):
    package(clean_modules, "transformer_engine", "import transformer_engine.common\nraise OSError('no core library')")
    package(clean_modules / "transformer_engine", "common", "")
    told = []
    prepare_imports(tell=told.append)
    prepare_imports(tell=told.append)
    assert len([line for line in told if "no core library" in line]) == 1
    for name in ("transformer_engine", "transformer_engine.common", "transformer_engine_torch", "apex"):
        with pytest.raises(ImportError):
            __import__(name)
    assert not is_loaded()


def test_an_old_transformer_engine_is_not_used(clean_modules):
    package(clean_modules, "transformer_engine", "__version__ = '1.13.0'")
    package(clean_modules / "transformer_engine", "pytorch", "")
    package(clean_modules / "transformer_engine" / "pytorch", "cpp_extensions", "")
    (clean_modules / "transformer_engine/pytorch/cpp_extensions/fused_attn.py").touch()
    assert find_transformer_engine().told().endswith("nemo_star needs 2.9 or later")


def test_nvidia_apex_is_not_taken_for_the_other(clean_modules):
    package(clean_modules, "apex", "")
    assert "PyPI's unrelated one" in unrelated_apex()
    package(clean_modules / "apex", "multi_tensor_apply", "")
    assert unrelated_apex() is None
