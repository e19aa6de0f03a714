"""The Triton kernels on a GPU: the cases of the interpreter (tests/unit/test_triton.py), in 16 bits; and in a model."""

import pytest
import torch
from golden import CASES as RECORDED
from golden import FEW, settings
from launch import generate_many, write_jsonl
from safetensors.torch import load_file

pytest.importorskip("triton", reason="Triton is not installed: torch's CUDA builds for Linux bring it")
from triton_cases import CASES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_a_case_is_right(name, dtype):
    if name.endswith("the device") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the device has no float8_e4m3fn: compute capability 8.9 has")
    CASES[name](torch.device("cuda"), dtype)


def test_a_model_is_as_good_as_with_torch(tiny, tmp_path, golden_logits):
    """In bfloat16, the first token's logits err at most twice as much as with torch's kernel and merge."""
    errors = {}
    for kernel, merge, said in (("flash", "torch", "flash"), ("triton", "triton", "prefill flash, decode triton")):
        keys = [f"attention.kernel={kernel}", f"parallel.merge={merge}", "overwrite=true"]
        errors[kernel] = 0.0
        for case in [case for case in RECORDED if case["id"] in FEW and case["world_size"] == 1]:
            row = {"id": case["id"], "context_ids": case["context_ids"], "query_ids": case["query_ids"]}
            source, logits = write_jsonl(tmp_path / "in.jsonl", [row]), tmp_path / "logits.safetensors"
            run = [f"checkpoint={tiny}", f"input={source}", f"output_logits={logits}", *keys, *settings(case)]
            (result,) = generate_many(1, [run], tmp_path, gpu=True)
            assert result["code"] == 0, result
            assert f"kernel {said}, bfloat16" in result["stderr"]
            assert "does not" not in result["stderr"]  # nothing else was taken instead
            name = f"{case['id']}/logits"
            error = (load_file(logits)[name][0] - golden_logits[name][0]).abs().max().item()
            errors[kernel] = max(errors[kernel], error)
    assert errors["triton"] <= max(2 * errors["flash"], 1e-2), errors
