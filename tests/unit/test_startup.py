"""What is imported when: imports are most of the time that a tool takes to start."""

import json
import subprocess
import sys

import pytest
import torch
from launch import ENVIRONMENT, ROOT
from transformers import AutoTokenizer

from nemo_star.text.tokenizer import Tokenizer


def loaded_after(program, *arguments):
    """Names of all modules in a new process after a program."""
    program += "\nimport json, sys; print(json.dumps(sorted(name for name in sys.modules if sys.modules[name])))"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_wrong_checkpoint_is_found_without_torch():
    program = """
import sys
sys.path.insert(0, "tools")
import generate
try:
    generate.main(["checkpoint=/nowhere", "context=a", "query=b"])
except ValueError as error:
    assert "checkpoint /nowhere does not exist" in str(error)
else:
    raise AssertionError
"""
    assert "torch" not in loaded_after(program)


def test_conversion_needs_neither_megatron_nor_transformers(tmp_path):
    program = """
import pathlib, sys
from nemo_star.checkpoint.convert import export_checkpoint, import_checkpoint
target = pathlib.Path(sys.argv[1])
import_checkpoint(pathlib.Path("assets/demo_model"), target / "converted")
export_checkpoint(target / "converted", target / "back")
"""
    loaded = loaded_after(program, tmp_path)
    assert not {"megatron", "megatron.core", "transformers"} & loaded
    assert (tmp_path / "back" / "model.safetensors").read_bytes()


def test_megatron_is_imported_without_torchs_compiler():
    program = """
from nemo_star.runtime.importing import no_garbage_collection
from nemo_star.runtime.transformer_engine import prepare_imports
import gc
with no_garbage_collection():
    assert not gc.isenabled()
    prepare_imports()
    prepare_imports()
    import nemo_star.offline.generate
assert gc.isenabled()
import megatron.core.jit
def function(): pass
assert megatron.core.jit.jit_fuser(function) is function
import megatron.core.transformer.moe.router
"""
    loaded = loaded_after(program)
    assert "megatron.core.transformer.moe.router" in loaded
    assert not {"transformers", "sentencepiece"} & loaded
    if hasattr(torch.compiler, "set_default_backend"):  # from torch 2.13 on
        assert "torch._inductor.compile_fx" not in loaded


def test_what_others_compile_is_compiled_as_always():
    """The backend that torch.compile takes by itself is the same after Megatron's import."""
    program = """
import torch
from nemo_star.runtime.transformer_engine import prepare_imports
prepare_imports()
import megatron.core
assert torch.compiler.get_default_backend() == "inductor"
"""
    import torch

    if not hasattr(torch.compiler, "get_default_backend"):
        pytest.skip("this torch has one backend")
    loaded_after(program)


def test_a_plain_tokenizer_needs_no_transformers():
    program = """
from pathlib import Path
from nemo_star.text.tokenizer import Tokenizer
tokenizer = Tokenizer.load(Path("assets/demo_model"))
assert tokenizer.decode(tokenizer.encode_context("A ship. " * 20000)).endswith("A ship. ")
assert len(tokenizer.special_tokens) == 3
"""
    assert "transformers" not in loaded_after(program)


def test_a_tokenizer_of_the_general_class_needs_no_automatic_choice():
    """Half of the time that transformers takes to be imported."""
    program = """
from pathlib import Path
from nemo_star.text.tokenizer import Tokenizer
assert Tokenizer.load(Path("assets/demo_model")).hf.is_fast
"""
    loaded = loaded_after(program)
    assert "transformers" in loaded
    assert "transformers.models.auto.tokenization_auto" not in loaded


MODEL_TYPES = "glm glm4 glm4_moe llama ministral3 mistral mistral3 mixtral olmo2 phi3 qwen2 qwen3 qwen3_moe".split()


@pytest.mark.parametrize(
    ("declared", "model_type"),
    [("PreTrainedTokenizerFast", model_type) for model_type in MODEL_TYPES]
    + [(declared, "llama") for declared in ("TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast", None)],
)
def test_the_short_way_to_a_tokenizer_leads_to_the_same(tmp_path, declared, model_type):
    for file in (ROOT / "assets/demo_model").glob("*.json"):
        values = json.loads(file.read_text())
        if file.name == "tokenizer_config.json":
            values["tokenizer_class"] = declared
            values = {name: value for name, value in values.items() if value is not None}
        if file.name == "config.json":
            values["model_type"] = model_type
        (tmp_path / file.name).write_text(json.dumps(values))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert type(ours.hf) is type(theirs)
    text = "The number  is 4242.\nWhat is it? \N{SNOWMAN} </s>x"
    assert ours.hf(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.hf.all_special_ids == theirs.all_special_ids
    assert ours.hf.decode(theirs(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])


def test_transformer_engine_is_imported_after_torch(tmp_path):
    """Its library needs NCCL, which torch brings into the process, and does not look for it."""
    package = tmp_path / "transformer_engine"
    for name in ("", "pytorch", "pytorch/cpp_extensions", "pytorch/cpp_extensions/fused_attn"):
        (package / name).mkdir(parents=True, exist_ok=True)
        (package / name / "__init__.py").touch()
    (package / "__init__.py").write_text("import sys\nassert 'torch' in sys.modules\n__version__ = '2.20.2'\n")
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from nemo_star.runtime.transformer_engine import find_transformer_engine
assert "torch" not in sys.modules
assert find_transformer_engine().told() == "Transformer Engine 2.20.2 works", find_transformer_engine()
"""
    assert "transformer_engine.pytorch" in loaded_after(program, tmp_path)
