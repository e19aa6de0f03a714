"""Conversion both ways, and dense logits against transformers on random models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_star.checkpoint.convert import export_checkpoint, import_checkpoint
from nemo_star.checkpoint.description import read_description
from nemo_star.checkpoint.hf import INDEX_FILE
from nemo_star.models.families.llama import FAMILY

UNUSUAL_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 20000.0,
    "factor": 3.5,
    "low_freq_factor": 2.0,
    "high_freq_factor": 7.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "plain": {},
    "llama3-rope": {"rope_parameters": UNUSUAL_ROPE},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": 6},
    "multi-query": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 16},
    "sharded": {},
    "bfloat16": {},
}


def hf_model(folder, variant="plain"):
    """A random Llama of transformers, saved in `folder`."""
    torch.manual_seed(sorted(VARIANTS).index(variant))
    settings = {
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "max_position_embeddings": 256,
        **VARIANTS[variant],
    }
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    if variant == "bfloat16":
        model = model.bfloat16()
    model.save_pretrained(folder, max_shard_size="40KB" if variant == "sharded" else "5GB")
    return model


def tensors(folder):
    """All tensors of a Hugging Face directory."""
    if (folder / INDEX_FILE).exists():
        index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
        return {name: load_file(folder / file)[name] for name, file in index.items()}
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_gives_back_the_same_tensors(tmp_path, variant):
    model = hf_model(tmp_path / "hf", variant)
    assert (tmp_path / "hf" / INDEX_FILE).exists() == (variant == "sharded")
    description = import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    assert description == read_description(tmp_path / "converted")
    assert description.dtype == ("bfloat16" if variant == "bfloat16" else "float32")
    export_checkpoint(tmp_path / "converted", tmp_path / "back")
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_logits_are_those_of_transformers(tmp_path, variant):
    from nemo_star import LLM

    hf_model(tmp_path / "hf", variant)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    generator = torch.Generator().manual_seed(5)
    context, query = (torch.randint(131, (n,), generator=generator).tolist() for n in (90, 7))
    engine = LLM(tmp_path / "converted", attention={"kind": "dense"}).engine
    encoded = engine.encode(context)
    choose = lambda logits: (int(logits.argmax()), False)  # noqa: E731
    steps = list(engine.generate(encoded, query, max_tokens=10, choose=choose))
    ids = context + query + [step.token for step in steps]
    with torch.no_grad():
        expected = model(torch.tensor([ids[:-1]])).logits[0, len(context + query) - 1 :]
    assert (torch.stack([step.logits for step in steps]) - expected).abs().max() <= 5e-4
    assert [step.token for step in steps] == expected.argmax(-1).tolist()


def test_dtype_converts_and_says_so(tmp_path):
    hf_model(tmp_path / "hf")
    description = import_checkpoint(tmp_path / "hf", tmp_path / "converted", torch.bfloat16)
    assert description.dtype == "bfloat16"
    export_checkpoint(tmp_path / "converted", tmp_path / "back")
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert all(torch.equal(tensor.bfloat16(), after[name]) for name, tensor in before.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_old_configurations_with_rope_theta_and_rope_scaling(tmp_path):
    hf_model(tmp_path / "hf", "llama3-rope")
    new = import_checkpoint(tmp_path / "hf", tmp_path / "new").model
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert import_checkpoint(tmp_path / "hf", tmp_path / "old").model == new
    assert new.rope_scaling.factor == 3.5
    assert new.rotary_base == 20000.0


def test_a_short_configuration_means_what_transformers_takes_it_for():
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    short = dict(zip(sizes, (131, 48, 80, 3, 6), strict=True))
    assert FAMILY.model_config(short) == FAMILY.model_config(LlamaConfig(**short).to_dict())


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_tensors(folder, change):
    file = folder / "model.safetensors"
    stored = load_file(file)
    change(stored)
    save_file(stored, file, metadata={"format": "pt"})


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


NORM = "model.norm.weight"
BREAKAGES = {
    "no directory": (shutil.rmtree, "does not exist"),
    "no config": (lambda d: (d / "config.json").unlink(), "it has no config.json"),
    "config no json": (lambda d: (d / "config.json").write_text("{"), "is not valid JSON"),
    "other architecture": (
        lambda d: edit_config(d, architectures=["MambaForCausalLM"]),
        "is of architecture MambaForCausalLM; supported: Gemma3ForCausalLM, GlmForCausalLM",
    ),
    "unsupported setting": (lambda d: edit_config(d, hidden_act="relu"), "hidden_act='relu' is not supported"),
    "missing size": (lambda d: edit_config(d, vocab_size=None), "config.json lacks vocab_size"),
    "ill-typed size": (lambda d: edit_config(d, vocab_size="131"), "vocab_size='131' must be of type int"),
    "half a rope": (
        lambda d: edit_config(d, rope_scaling={"type": "linear"}),
        "rope scaling of type 'linear' lacks factor",
    ),
    "unsupported rope": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "axial", "rope_theta": 1e4, "factor": 2.0}),
        "rope scaling of type 'axial' is not supported",
    ),
    "no safetensors": (lambda d: (d / "model.safetensors").unlink(), "only safetensors are read"),
    "truncated": (lambda d: truncate(d / "model.safetensors"), "is truncated or damaged"),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(NORM)), f"tensor {NORM} is missing"),
    "wrong shape": (
        lambda d: edit_tensors(d, lambda t: t.update({NORM: torch.ones(5)})),
        f"tensor {NORM} has shape (5,), config.json asks for (48,)",
    ),
    "unknown tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.extra": torch.ones(5)})),
        "holds 1 tensors that LlamaForCausalLM does not have, the first model.extra",
    ),
    "integer tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({NORM: torch.ones(48, dtype=torch.int8)})),
        "is of type I8",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_source_is_refused_and_leaves_nothing(tmp_path, name):
    hf_model(tmp_path / "hf")
    break_it, message = BREAKAGES[name]
    break_it(tmp_path / "hf")
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        import_checkpoint(tmp_path / "hf", tmp_path / "out" / "converted")
    assert message in str(error.value)
    assert not list((tmp_path / "out").glob("*"))
    assert not list((tmp_path / "out").glob(".*"))


def test_a_missing_shard_is_named(tmp_path):
    hf_model(tmp_path / "hf", "sharded")
    shard = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is named by {INDEX_FILE} but missing"):
        import_checkpoint(tmp_path / "hf", tmp_path / "converted")


def test_an_existing_target_is_not_touched(tmp_path, tiny):
    (tmp_path / "converted").mkdir()
    hf_model(tmp_path / "hf")
    with pytest.raises(ValueError, match="exists: give a new directory"):
        import_checkpoint(tmp_path / "hf", tmp_path / "converted")
    with pytest.raises(ValueError, match="exists: give a new directory"):
        export_checkpoint(tiny, tmp_path / "converted")


def test_a_damaged_converted_checkpoint_is_noticed_before_loading(tmp_path, tiny):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    data = next((copy / "weights").glob("*.distcp"))
    size = data.stat().st_size
    truncate(data)
    with pytest.raises(ValueError, match=f"has {size - 100} bytes, should have {size}"):
        read_description(copy)
    data.unlink()
    with pytest.raises(ValueError, match=f"{data.name} is missing"):
        read_description(copy)
    (copy / "nemo_star.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_description(copy)
    (copy / "nemo_star.json").unlink()
    with pytest.raises(ValueError, match="is not a converted checkpoint"):
        read_description(copy)


def test_a_hugging_face_directory_given_for_a_converted_one_is_recognised(tmp_path):
    hf_model(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"convert it first, nemo-star convert import --source"):
        read_description(tmp_path / "hf")
