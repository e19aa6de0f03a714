"""A Hugging Face directory as `checkpoint`: converted once into a cache folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import ENVIRONMENT
from test_checkpoint import hf_model

from nemo_star import LLM
from nemo_star.checkpoint.description import read_description
from nemo_star.checkpoint.direct import locate_checkpoint

CONVERT = """
import pathlib, sys
from nemo_star.checkpoint.direct import locate_checkpoint
locate_checkpoint(pathlib.Path(sys.argv[1]), sys.argv[2]).convert()
"""


def logits(checkpoint, **options):
    llm = LLM(checkpoint, attention={"kind": "dense"}, **options)
    choose = lambda logits: (int(logits.argmax()), True)  # noqa: E731
    [step] = llm.engine.generate(llm.engine.encode(list(range(20))), [3, 4], max_tokens=1, choose=choose)
    return step.logits


def test_it_is_converted_once_and_anew_when_it_changes(tmp_path, capsys):
    model = hf_model(tmp_path / "hf")
    first = logits(tmp_path / "hf", cache_dir=tmp_path / "cache", verify=True)
    [converted] = (tmp_path / "cache").iterdir()
    assert converted.name.startswith("hf-")
    assert f"converting {tmp_path / 'hf'}, once, into {converted} (cache_dir)" in capsys.readouterr().err
    with torch.no_grad():
        expected = model(torch.tensor([[*range(20), 3, 4]])).logits[0, -1]
    assert (first - expected).abs().max() <= 5e-4
    times = {file: file.stat().st_mtime_ns for file in converted.rglob("*")}
    assert torch.equal(logits(tmp_path / "hf", cache_dir=tmp_path / "cache"), first)
    assert "converting" not in capsys.readouterr().err
    assert times == {file: file.stat().st_mtime_ns for file in converted.rglob("*")}
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "hf")
    os.utime(tmp_path / "hf" / "model.safetensors", ns=(1, 1))
    assert not torch.equal(logits(tmp_path / "hf", cache_dir=tmp_path / "cache"), first)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_is_wrong_is_said_before_anything_is_converted(tmp_path):
    hf_model(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size|world size"):
        LLM(tmp_path / "hf", cache_dir=tmp_path / "cache", parallel={"tensor_model_parallel_size": 4})
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act='relu' is not supported"):
        LLM(tmp_path / "hf", attention={"kind": "dense"}, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_place_is_in_the_users_folder_for_caches(tmp_path, monkeypatch):
    hf_model(tmp_path / "hf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert locate_checkpoint(tmp_path / "hf", None).converted.parent == tmp_path / "xdg" / "nemo_star"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert locate_checkpoint(tmp_path / "hf", None).converted.parent == tmp_path / "home" / ".cache" / "nemo_star"
    assert locate_checkpoint(tmp_path / "hf", str(tmp_path)).converted.parent == tmp_path


def test_two_jobs_at_once_convert_once(tmp_path):
    hf_model(tmp_path / "hf")
    command = [sys.executable, "-c", CONVERT, str(tmp_path / "hf"), str(tmp_path / "cache")]
    jobs = [subprocess.Popen(command, env=ENVIRONMENT, cwd=Path.cwd(), stderr=subprocess.PIPE) for _ in range(3)]
    for job in jobs:
        _, error = job.communicate()
        assert job.returncode == 0, error.decode()
    [converted] = (tmp_path / "cache").iterdir()
    assert read_description(converted).architecture == "LlamaForCausalLM"
    assert sorted(file.name for file in converted.iterdir()) == ["hf", "nemo_star.json", "weights"]


def test_a_converted_checkpoint_is_where_it_is(tiny):
    place = locate_checkpoint(tiny, None)
    assert place.converted == tiny
    assert not place.is_missing
