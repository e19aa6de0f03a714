"""Conversion that is killed, resumed, divided, out of space; checksums; damaged files."""

import fcntl
import hashlib
import json
import os
import pickle
import shutil
import signal
import sys

import pytest
import torch
from launch import ROOT, run_tool
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import hf_model

from nemo_star import LLM
from nemo_star.checkpoint import directory, exporting, importing
from nemo_star.checkpoint.convert import export_checkpoint, import_checkpoint
from nemo_star.checkpoint.description import read_description
from nemo_star.checkpoint.hf import INDEX_FILE, HFReader
from nemo_star.checkpoint.safetensors_file import read_header
from nemo_star.checkpoint.stream import DistCheckpointReader
from nemo_star.checkpoint.verify import verify_checkpoint
from nemo_star.commands.convert import main
from nemo_star.config.llm import LLMConfig

FILE_BYTES = 40_000


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(importing, "MAX_FILE_BYTES", FILE_BYTES)
    monkeypatch.setattr(exporting, "MAX_SHARD_BYTES", FILE_BYTES)


def content(folder):
    """Checksum of every file."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_two_imports_give_the_same_bytes_and_checksums(tmp_path, small_files):
    hf_model(tmp_path / "hf", "sharded")
    description = import_checkpoint(tmp_path / "hf", tmp_path / "one")
    import_checkpoint(tmp_path / "hf", tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    found = {name: content(tmp_path / "one")[f"weights/{name}"] for name in description.weight_files}
    assert description.sha256 == found
    assert len(list((tmp_path / "one" / "weights").glob("*.distcp"))) > 5
    verify_checkpoint(tmp_path / "one", read_description(tmp_path / "one"))


@pytest.mark.parametrize(("action", "count"), [("import", 9), ("export", 25)])
def test_killed_in_the_middle_and_resumed_it_gives_the_same_bytes(tmp_path, small_files, capsys, action, count):
    hf_model(tmp_path / "hf", "sharded")
    source, convert = tmp_path / "hf", import_checkpoint
    if action == "export":
        import_checkpoint(source, tmp_path / "converted")
        source, convert = tmp_path / "converted", export_checkpoint
    convert(source, tmp_path / "whole")
    done = run_tool(ROOT / "tests/workers/killed_import.py", action, source, tmp_path / "target", FILE_BYTES, count)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "target").exists()
    partial = tmp_path / ".target.partial"
    complete = {name: file for name, file in content(partial).items() if name.endswith(("distcp", "safetensors"))}
    assert complete
    times = {name: (partial / name).stat().st_mtime_ns for name in complete}
    with (partial / ".journal").open("a") as journal:
        journal.write('{"file": "wei')  # a line that was cut
    convert(source, tmp_path / "target")
    assert f"going on in {partial}: {len(complete)} of " in capsys.readouterr().err
    assert content(tmp_path / "target") == content(tmp_path / "whole")
    assert times == {name: (tmp_path / "target" / name).stat().st_mtime_ns for name in complete}
    assert not partial.exists()


def test_a_changed_source_starts_anew(tmp_path, small_files):
    model = hf_model(tmp_path / "hf")
    done = run_tool(
        ROOT / "tests/workers/killed_import.py", "import", tmp_path / "hf", tmp_path / "target", FILE_BYTES, 9
    )
    assert done.returncode == -signal.SIGKILL
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    model.save_pretrained(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "target")
    import_checkpoint(tmp_path / "hf", tmp_path / "whole")
    assert content(tmp_path / "target") == content(tmp_path / "whole")


def test_several_processes_give_the_same_bytes(tmp_path, small_files):
    hf_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "one")
    import_checkpoint(tmp_path / "hf", tmp_path / "two", processes=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_too_little_space_is_said_with_both_numbers(tmp_path, monkeypatch):
    hf_model(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda folder: usage._replace(free=1_230_000))
    with pytest.raises(ValueError, match=r"takes 0.00 GB, and .* has 0.00 GB free: make room"):
        import_checkpoint(tmp_path / "hf", tmp_path / "out" / "target")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_leaves_what_is_complete(tmp_path, small_files, monkeypatch, capsys):
    hf_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "whole")
    make, count = importing._make, iter(range(100))

    def failing(*arguments):
        if next(count) == 9:
            raise OSError(28, "No space left on device")
        return make(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(importing, "_make", failing)
        with pytest.raises(OSError, match="No space left"):
            import_checkpoint(tmp_path / "hf", tmp_path / "target")
    assert "the same command goes on" in capsys.readouterr().err
    import_checkpoint(tmp_path / "hf", tmp_path / "target")
    assert content(tmp_path / "target") == content(tmp_path / "whole")


def test_one_process_converts_into_a_target_at_a_time(tmp_path):
    hf_model(tmp_path / "hf")
    (tmp_path / ".target.partial").mkdir()
    with open(tmp_path / ".target.partial" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is converting into"):
            import_checkpoint(tmp_path / "hf", tmp_path / "target")
    import_checkpoint(tmp_path / "hf", tmp_path / "target")


def test_a_flipped_byte_is_found(tmp_path, small_files, capsys):
    hf_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    assert main(["verify", "--source", str(tmp_path / "converted")]) == 0
    assert "have the checksums of their conversion" in capsys.readouterr().out
    file = sorted((tmp_path / "converted" / "weights").glob("*.distcp"))[2]
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"weights/{file.name} has SHA-256 .*, should have"):
        main(["verify", "--source", str(tmp_path / "converted")])
    with pytest.raises(ValueError, match=rf"weights/{file.name} has SHA-256"):
        LLM(tmp_path / "converted", attention={"kind": "dense"}, verify=True)


def test_a_checkpoint_of_format_version_1_loads(tmp_path, tiny):
    copy = shutil.copytree(tiny, tmp_path / "old")
    description = json.loads((copy / "nemo_star.json").read_text())
    description["format_version"] = 1
    del description["sha256"], description["unstacked"]
    (copy / "nemo_star.json").write_text(json.dumps(description))
    assert read_description(copy).model == read_description(tiny).model
    with pytest.raises(ValueError, match="format version 1, which has no checksums"):
        verify_checkpoint(copy, read_description(copy))
    with pytest.raises(ValueError, match="has no checksums: convert it again, or leave out verify"):
        LLM.opened(LLMConfig(checkpoint=str(copy), verify=True))
    description["format_version"] = 3
    (copy / "nemo_star.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="has format version 3, this program reads 1 and 2"):
        read_description(copy)


class Evil:
    """Runs what it likes when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_a_pickle_in_place_of_a_description_of_tensors_is_not_loaded(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (copy / "weights" / ".metadata").write_bytes(pickle.dumps(Evil()))
    values = json.loads((copy / "nemo_star.json").read_text())
    values["weight_files"][".metadata"] = (copy / "weights" / ".metadata").stat().st_size
    (copy / "nemo_star.json").write_text(json.dumps(values))
    for use in (
        lambda: LLM(copy, attention={"kind": "dense"}),
        lambda: export_checkpoint(copy, tmp_path / "back"),
        lambda: DistCheckpointReader(copy / "weights"),
    ):
        with pytest.raises(ValueError, match=r"\.metadata is a pickle that is not loaded: it names posix.mkdir"):
            use()
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "back").exists()


def test_a_pickle_of_weights_is_not_loaded(tmp_path):
    hf_model(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"only safetensors are read; pytorch_model.bin is a pickle, which could run"):
        import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    shutil.move(tmp_path / "hf" / "pytorch_model.bin", tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or damaged, or no safetensors file"):
        import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_a_damaged_shard_is_refused_by_tensor_and_file(tmp_path):
    hf_model(tmp_path / "hf", "sharded")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{files[1].name} is truncated or damaged: tensor model\.\S+ ends at byte"):
        HFReader(tmp_path / "hf")
    files[1].write_bytes(whole + b"x")
    with pytest.raises(ValueError, match=rf"{files[1].name} is truncated or damaged: it has"):
        HFReader(tmp_path / "hf")
    files[1].write_bytes(whole)
    stored = load_file(files[1])
    name = next(iter(stored))
    save_file({key: value for key, value in stored.items() if key != name}, files[1])
    with pytest.raises(ValueError, match=f"tensor {name} is missing in {files[1].name}, where {INDEX_FILE} has it"):
        HFReader(tmp_path / "hf")
    save_file({**stored, "model.extra.weight": torch.ones(3)}, files[1])
    with pytest.raises(ValueError, match=rf"the first model.extra.weight \(in {files[1].name}\)"):
        import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    save_file({**stored, name: torch.ones(3)}, files[1])
    with pytest.raises(ValueError, match=rf"tensor {name} has shape \(3,\), .* \(in {files[1].name}\)"):
        import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_a_flipped_byte_in_a_header_is_refused_or_changes_nothing(tmp_path):
    """Compared with the safetensors library, which is none of ours."""
    good = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4).bfloat16()}
    file = tmp_path / "model.safetensors"
    save_file(good, file, metadata={"format": "pt"})
    raw, expected = file.read_bytes(), read_header(file)
    length = 8 + int.from_bytes(raw[:8], "little")
    for place in range(length):
        changed = bytearray(raw)
        changed[place] ^= 1
        file.write_bytes(changed)
        try:
            found = read_header(file)
        except ValueError:
            continue
        with safe_open(file, "pt") as theirs:
            assert set(theirs.keys()) == set(found)
        assert sorted(map(repr, found.values())) == sorted(map(repr, expected.values()))  # another name at most


def test_inspect_says_what_a_checkpoint_is(tmp_path, capsys):
    hf_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    assert main(["inspect", "--source", str(tmp_path / "hf")]) == 0
    said = capsys.readouterr().out
    for word in ("Hugging Face checkpoint", "LlamaForCausalLM", "3 layers, hidden 48", "F32", "tokenizer     none"):
        assert word in said
    assert main(["inspect", "--source", str(tmp_path / "converted")]) == 0
    said = capsys.readouterr().out
    for word in ("converted checkpoint, format version 2", "mostly float32", "SHA-256"):
        assert word in said
    with pytest.raises(ValueError, match="is no checkpoint that is known here"):
        main(["inspect", "--source", str(tmp_path)])


def test_check_compares_logits_with_transformers(tmp_path, capsys):
    model = hf_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    command = ["check", "--source", str(tmp_path / "hf"), "--checkpoint", str(tmp_path / "converted")]
    assert main(command) == 0
    assert "same greedy token at 32 of 32 steps" in capsys.readouterr().out
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "hf")
    assert main(command) == 1
    assert "largest difference of a logit" in capsys.readouterr().out
    with pytest.raises(ValueError, match="32 steps of 40 ids: give at least 41 ids"):
        main([*command, "--tokens", "40"])


def test_check_refuses_what_does_not_fit(tmp_path, monkeypatch):
    from nemo_star.evaluation import agreement
    from nemo_star.runtime.memory import FreeMemory

    hf_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    monkeypatch.setattr(agreement, "free_memory", lambda device: FreeMemory("here", 1000))
    with pytest.raises(ValueError, match="GB of memory are free: check it on a larger machine"):
        main(["check", "--source", str(tmp_path / "hf"), "--checkpoint", str(tmp_path / "converted")])
    assert sys.modules["nemo_star.evaluation.agreement"] is agreement
