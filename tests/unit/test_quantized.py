"""Quantized checkpoints against transformers' own dequantization."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import edit_config, edit_tensors, hf_model, tensors
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nemo_star.checkpoint.convert import export_checkpoint, import_checkpoint
from nemo_star.checkpoint.hf import HFReader
from nemo_star.checkpoint.quantized import dequantize_fp8, dequantize_mxfp4, dequantized

BLOCK = (32, 16)


def quantize(weight, block):
    """[rows, columns] -> FP8 and its scales, of whole and partial blocks; None: one scale."""
    if block is None:
        scale = weight.abs().max() / 448
        return (weight / scale).to(torch.float8_e4m3fn), scale
    rows, columns = (-(-size // part) for size, part in zip(weight.shape, block, strict=True))
    scale = torch.rand(rows, columns) * 0.01 + 0.001
    whole = scale.repeat_interleave(block[0], 0)[: weight.shape[0]].repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    return (weight / whole).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def quantize_file(folder, block, scale_name="weight_scale_inv"):
    """The projections of a saved model in FP8; returns what transformers makes of each."""
    expected = {}

    def change(stored):
        for name in [name for name in stored if name.endswith("_proj.weight")]:
            stored[name], scale = quantize(stored[name], block)
            stored[name.removesuffix("weight") + scale_name] = scale
            expected[name] = _dequantize_fp8_weight(stored[name], scale, block, torch.float32)
            if block is None:
                stored[name.removesuffix("weight") + "activation_scale"] = torch.ones(())

    edit_tensors(folder, change)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    return expected


@pytest.mark.parametrize("shape", [(64, 32), (65, 47), (31, 15)])
def test_fp8_blocks_are_multiplied_as_transformers_does(shape):
    torch.manual_seed(3)
    weight, scale = quantize(torch.randn(shape), BLOCK)
    expected = _dequantize_fp8_weight(weight, scale, BLOCK, torch.float32)
    assert torch.equal(dequantize_fp8(weight, scale, BLOCK), expected)


@pytest.mark.parametrize(
    ("block", "name"), [(BLOCK, "weight_scale_inv"), (None, "weight_scale_inv"), (None, "weight_scale")]
)
def test_an_fp8_checkpoint_imports_in_bfloat16(tmp_path, block, name):
    hf_model(tmp_path / "hf", "bfloat16")
    expected = quantize_file(tmp_path / "hf", block, name)
    assert import_checkpoint(tmp_path / "hf", tmp_path / "converted").dtype == "bfloat16"
    assert "quantization_config" not in json.loads((tmp_path / "converted" / "hf" / "config.json").read_text())
    export_checkpoint(tmp_path / "converted", tmp_path / "back")
    before, after = load_file(tmp_path / "hf" / "model.safetensors"), tensors(tmp_path / "back")
    for tensor, found in after.items():
        assert torch.equal(found, expected[tensor].bfloat16() if tensor in expected else before[tensor]), tensor


def test_an_fp8_checkpoint_imports_in_the_type_that_is_asked_for(tmp_path):
    hf_model(tmp_path / "hf", "bfloat16")
    expected = quantize_file(tmp_path / "hf", BLOCK)
    import_checkpoint(tmp_path / "hf", tmp_path / "converted", torch.float32)
    export_checkpoint(tmp_path / "converted", tmp_path / "back")
    after = tensors(tmp_path / "back")
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"


SCALE = "model.layers.1.mlp.up_proj.weight_scale_inv"
BREAKAGES = {
    "missing scale": (lambda stored: stored.pop(SCALE), rf"and its scale {SCALE} is missing"),
    "ill-shaped scale": (
        lambda stored: stored.update({SCALE: torch.ones(2, 3)}),
        rf"and its scale {SCALE} has shape \(2, 3\), should have \(3, 3\)",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_scale_that_does_not_fit_is_refused(tmp_path, name):
    hf_model(tmp_path / "hf", "bfloat16")
    quantize_file(tmp_path / "hf", BLOCK)
    change, message = BREAKAGES[name]
    edit_tensors(tmp_path / "hf", change)
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor model.layers.1.mlp.up_proj.weight .*{message}"):
        import_checkpoint(tmp_path / "hf", tmp_path / "converted")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_other_quantizations_are_refused_by_name(tmp_path, method):
    hf_model(tmp_path / "hf")
    edit_config(tmp_path / "hf", quantization_config={"quant_method": method})
    with pytest.raises(ValueError, match=f"quant_method='{method}' is not supported, only fp8 and mxfp4"):
        import_checkpoint(tmp_path / "hf", tmp_path / "converted")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_is_what_transformers_makes_of_it(dtype):
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(256, (3, 20, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(1, 250, (3, 20, 2), dtype=torch.uint8, generator=generator)
    found = dequantize_mxfp4(blocks, scales, dtype)
    assert found.shape == (3, 64, 20)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales, dtype=dtype))


def test_mxfp4_experts_are_read_under_their_own_names(tmp_path):
    generator = torch.Generator().manual_seed(2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {
        f"{name}_blocks": torch.randint(256, (2, 8, 3, 16), dtype=torch.uint8, generator=generator),
        f"{name}_scales": torch.randint(120, 130, (2, 8, 3), dtype=torch.uint8, generator=generator),
        f"{name}_bias": torch.ones(2, 8).bfloat16(),
    }
    save_file(stored, tmp_path / "model.safetensors")
    config = {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reader = dequantized(HFReader(tmp_path), None)
    assert sorted(reader.names()) == [name, f"{name}_bias"]
    assert (reader.shape(name), reader.dtype(name), reader.file_of(name)) == (
        (2, 96, 8),
        torch.bfloat16,
        "model.safetensors",
    )
    assert torch.equal(reader.get(name), convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"]))
    assert torch.equal(reader.get(f"{name}_bias"), stored[f"{name}_bias"])
    assert "quantization_config" not in reader.values
    del stored[f"{name}_scales"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"tensor {name}_blocks is there, and its {name}_scales is missing"):
        dequantized(HFReader(tmp_path), None)
