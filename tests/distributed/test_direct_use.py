"""A Hugging Face directory as `checkpoint` under torchrun: one rank converts, the others wait."""

import json

from launch import ROOT, read_jsonl, torchrun, write_jsonl


def test_one_of_two_ranks_converts_and_both_answer(tmp_path, demo):
    write_jsonl(tmp_path / "in.jsonl", [{"id": 1, "context_ids": list(range(3, 70)), "query_ids": [5, 6]}])
    arguments = [
        ROOT / "tools/generate.py",
        f"input={tmp_path / 'in.jsonl'}",
        "inference.tokens_to_generate=4",
        f"cache_dir={tmp_path / 'cache'}",
        "verify=true",
    ]
    done = torchrun(2, *arguments, f"checkpoint={ROOT / 'assets/demo_model'}", f"output={tmp_path / 'direct.jsonl'}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("converting ") == 1
    [converted] = (tmp_path / "cache").iterdir()
    assert json.loads((converted / "nemo_star.json").read_text())["architecture"] == "LlamaForCausalLM"
    done = torchrun(2, *arguments, f"checkpoint={demo}", f"output={tmp_path / 'converted.jsonl'}")
    assert done.returncode == 0, done.stderr
    direct, usual = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("direct", "converted"))
    assert direct[0]["token_ids"] == usual[0]["token_ids"]
