"""Checkpoints of NeMo 2 and Megatron-Bridge, laid out as these programs document, written by torch's own writer."""

import argparse
import json
import os
import pickle
import shutil

import pytest
import torch
import yaml
from dcp_writer import save_torch_dist
from family_models import save_model
from golden import GOLDEN
from test_checkpoint import tensors, truncate
from transformers import AutoModelForCausalLM

from nemo_star import LLM
from nemo_star.checkpoint.convert import export_checkpoint
from nemo_star.checkpoint.description import read_description
from nemo_star.checkpoint.importing import plan_import
from nemo_star.checkpoint.verify import verify_checkpoint
from nemo_star.commands.convert import main
from nemo_star.models.families.weights import each_layer_named

PADDED = 192
"""Rows of the embedding: Megatron pads a vocabulary (here 131) to a multiple."""


class Evil:
    """Runs what it likes when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("evil",))


def megatron_tensors(source, prefix="", *, stacked=True):
    """Key -> whole tensor, as a model of Megatron's would give them."""
    plan = plan_import(source)
    whole = {}
    for chunk in plan.chunks:
        tensor = whole.setdefault(chunk.key, torch.empty(chunk.global_shape, dtype=chunk.dtype))
        place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.shape, strict=True))
        tensor[place] = chunk.make().view(chunk.shape)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if key in whole:
            whole[key] = torch.cat([whole[key], torch.full((PADDED - 131, whole[key].shape[1]), 7.0)])
    if not stacked:
        head = "decoder.layers."
        for key in [key for key in whole if key.startswith(head)]:
            for layer, tensor in enumerate(whole.pop(key)):
                whole[f"{head}{layer}.{key.removeprefix(head)}"] = tensor.clone()
    return {prefix + key: tensor for key, tensor in whole.items()}, plan.model


def settings(model):
    return {
        "_target_": "nemo.collections.llm.gpt.model.llama.LlamaConfig",
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
        "layernorm_epsilon": model.layernorm_epsilon,
        "rotary_base": model.rotary_base,
        "kv_channels": None,
    }


def state_of_training(prefix):
    """What lies beside the weights, and is not imported."""
    moments = {f"optimizer.state.exp_avg.{prefix}decoder.final_layernorm.weight": torch.ones(48)}
    objects = {
        f"{prefix}decoder.layers.self_attention.linear_qkv._extra_state/shard_0_3": pickle.dumps(Evil()),
        "rng_state/shard_0.0_1.1": pickle.dumps(Evil()),
    }
    return moments, objects


def nemo(folder, source):
    """NeMo 2: weights/ with the prefix `module.`, context/ with YAML, JSON and pickles."""
    (folder / "weights").mkdir(parents=True)
    whole, model = megatron_tensors(source, "module.")
    moments, objects = state_of_training("module.")
    common = {"args": argparse.Namespace(a=1), "evil": Evil()}
    save_torch_dist(folder / "weights", {**whole, **moments}, parts=2, objects=objects, common=common)
    context = folder / "context"
    (context / "nemo_tokenizer").mkdir(parents=True)
    (context / "model.yaml").write_text(
        yaml.safe_dump({"_target_": "nemo.collections.llm.LlamaModel", "config": settings(model)})
        + "optim: !!python/object/apply:os.mkdir [evil]\n"
    )
    (context / "io.json").write_text("{}")
    (context / "0f3c2b7e-model-transform").write_bytes(pickle.dumps(Evil()))
    return folder


def bridge(folder, source, **options):
    """Megatron-Bridge: a tracker and iter_*/ with run_config.yaml and no prefix."""
    last = folder / "iter_0000200"
    whole, model = megatron_tensors(source, **options)
    moments, objects = state_of_training("")
    for iteration in (folder / "iter_0000100", last):
        iteration.mkdir(parents=True)
        save_torch_dist(iteration, {**whole, **moments}, parts=2, objects=objects, common={"evil": Evil()})
        (iteration / "run_config.yaml").write_text(yaml.safe_dump({"model": settings(model), "train": {"x": 1}}))
        (iteration / "train_state.pt").write_bytes(pickle.dumps(Evil()))
        whole = {key: tensor.clone() for key, tensor in whole.items()}
    (folder / "latest_checkpointed_iteration.txt").write_text("200\n")
    (folder / "latest_train_state.pt").write_bytes(pickle.dumps(Evil()))
    return folder


LAYOUTS = {
    "NeMo 2": ("llama-biases", nemo),
    "NeMo 2, tied": ("qwen2-tied", nemo),
    "Megatron-Bridge": ("qwen3", bridge),
    "Megatron-Bridge, experts": ("qwen3-moe", bridge),
    "Megatron-Bridge, some layers with experts": ("qwen3-moe-mixed", bridge),
    "Megatron-Bridge, keys of each layer": ("qwen3", lambda folder, source: bridge(folder, source, stacked=False)),
}


@pytest.fixture
def original(tmp_path, monkeypatch):
    """A Hugging Face model; what is unpickled here leaves a folder `evil`."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "hf", "llama-biases")
    yield tmp_path / "hf"
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_loads_where_it_lies_with_the_logits_of_transformers(tmp_path, layout, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case, write = LAYOUTS[layout]
    save_model(tmp_path / "hf", case)
    folder = write(tmp_path / "given", tmp_path / "hf")
    command = ["import", "--source", str(folder), "--target", "converted", "--hf-config", str(tmp_path / "hf")]
    assert main(command) == 0
    converted = tmp_path / "converted"
    assert all(file.is_symlink() for file in (converted / "weights").glob("*.distcp"))
    verify_checkpoint(converted, read_description(converted))
    ids = torch.randint(131, (40,), generator=torch.Generator().manual_seed(4)).tolist()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1]
    engine = LLM(converted, attention={"kind": "dense"}).engine
    choose = lambda logits: (int(logits.argmax()), True)  # noqa: E731
    [step] = engine.generate(engine.encode(ids[:30]), ids[30:], max_tokens=1, choose=choose)
    assert (step.logits - expected).abs().max() <= 5e-4
    export_checkpoint(converted, tmp_path / "back")
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not (tmp_path / "evil").exists()


def test_weights_are_copied_where_that_is_asked_for(tmp_path, original):
    folder = nemo(tmp_path / "given", original)
    (tmp_path / ".converted.partial" / "weights").mkdir(parents=True)  # what another conversion left
    command = ["import", "--source", str(folder), "--target", "converted", "--hf-config", str(original), "--copy"]
    assert main(command) == 0
    shutil.rmtree(folder)
    verify_checkpoint(tmp_path / "converted", read_description(tmp_path / "converted"))


def test_the_model_that_a_checkpoint_names_is_taken_where_it_is_a_folder(tmp_path, original, capsys):
    folder = bridge(tmp_path / "given", original)
    command = ["import", "--source", str(folder), "--target", "converted"]
    with pytest.raises(ValueError, match="a checkpoint of Megatron-Bridge does not say all .* give --hf-config DIR"):
        main(command)
    config = folder / "iter_0000200" / "run_config.yaml"
    values = yaml.safe_load(config.read_text())
    values["model"]["hf_model_id"] = "meta-llama/Llama-3.1-8B"
    config.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="the checkpoint was made from meta-llama/Llama-3.1-8B"):
        main(command)
    values["model"]["hf_model_id"] = str(original)
    config.write_text(yaml.safe_dump(values))
    assert main(command) == 0
    assert "its weight files are links into" in capsys.readouterr().out


def test_inspect_says_what_it_is(tmp_path, original, capsys):
    assert main(["inspect", "--source", str(nemo(tmp_path / "given", original))]) == 0
    said = capsys.readouterr().out
    for word in ("NeMo 2, torch_dist", "module.decoder", "1 tensors of the optimizer", "hidden_size   48"):
        assert word in said


def rewrite(folder, change):
    """weights/ again, after a change of the tensors."""
    whole, _ = megatron_tensors(folder.parent / "hf", "module.")
    change(whole)
    shutil.rmtree(folder / "weights")
    save_torch_dist(folder / "weights", whole)


def evil_description(folder):
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(Evil()))


NORM = "module.decoder.final_layernorm.weight"
BREAKAGES = {
    "truncated": (
        lambda f: truncate(max((f / "weights").glob("*.distcp"))),
        r"distcp is truncated: tensor \S+ ends at",
    ),
    "no file": (lambda f: max((f / "weights").glob("*.distcp")).unlink(), r"distcp with tensor \S+ is missing"),
    "missing": (lambda f: rewrite(f, lambda t: t.pop(NORM)), f"tensor {NORM} is missing"),
    "ill-shaped": (
        lambda f: rewrite(f, lambda t: t.update({NORM: torch.ones(5)})),
        rf"__0_0.distcp: tensor {NORM} has shape \(5,\), config.json asks for \(48,\)",
    ),
    "unknown": (
        lambda f: rewrite(f, lambda t: t.update({"module.decoder.extra": torch.ones(5)})),
        r"holds tensor module.decoder.extra \(in __0_0.distcp\)",
    ),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({NORM: torch.ones(48, dtype=torch.int8)})),
        f"tensor {NORM} is of type torch.int8",
    ),
    "a pickle": (evil_description, r"\.metadata is a pickle that is not loaded: it names posix.mkdir"),
    "damaged description": (
        lambda f: (f / "weights" / ".metadata").write_bytes(b"\x80\x04nothing"),
        r"\.metadata is damaged",
    ),
    "zarr": (
        lambda f: (f / "weights" / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "stored as zarr; supported: torch_dist",
    ),
    "another model": (
        lambda f: (f / "context" / "model.yaml").write_text("config: {num_layers: 4}"),
        "the checkpoint's num_layers is 4, that of the Hugging Face configuration 3",
    ),
    "no YAML": (lambda f: (f / "context" / "model.yaml").write_text("{"), "model.yaml is damaged"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_one_is_refused_and_leaves_nothing(tmp_path, original, name):
    folder = nemo(tmp_path / "given", original)
    change, message = BREAKAGES[name]
    change(folder)
    (tmp_path / "out").mkdir()
    command = ["import", "--source", str(folder), "--target", "out/converted", "--hf-config", str(original)]
    with pytest.raises(ValueError, match=message):
        main(command)
    assert not list((tmp_path / "out").iterdir())


def test_options_that_do_not_go_together_are_refused(tmp_path, original):
    folder = nemo(tmp_path / "given", original)
    with pytest.raises(ValueError, match="--dtype does not go with a checkpoint of NeMo 2"):
        main(["import", "--source", str(folder), "--target", "x", "--dtype", "bfloat16"])
    with pytest.raises(ValueError, match="--hf-config and --copy are for checkpoints of NeMo 2"):
        main(["import", "--source", str(original), "--target", "x", "--copy"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--hf-config .*empty has no config.json"):
        main(["import", "--source", str(folder), "--target", "x", "--hf-config", str(tmp_path / "empty")])


def test_names_of_each_layer_are_given_once():
    from nemo_star.models.families.llama import FAMILY

    model = plan_import(GOLDEN / "models" / "tiny-a").model
    table = each_layer_named(FAMILY.weights(model))
    assert each_layer_named(table) == table
    assert json.dumps([weight.key for weight in table]).count("{layer}") == len(table) - 3
