"""The Triton kernels: in Triton's interpreter on CPU, and compiled for GPUs that are not here; and when they are taken.

`tests/gpu/test_triton_gpu.py` runs the same cases on a GPU.
"""

import json

import pytest
import torch
from family_models import save_model
from launch import ROOT, run_tool
from oracle import inputs

from nemo_star.checkpoint.convert import import_checkpoint
from nemo_star.kernels import registry
from nemo_star.kernels import settle as settling
from nemo_star.kernels.merge import merge_by_triton, merge_with_sinks
from nemo_star.kernels.registry import get_kernel, get_merge, kernels_that_run
from nemo_star.kernels.settle import Heads, settle, settle_merge
from nemo_star.kernels.te import TEKernel
from nemo_star.kernels.torch_flash import FlashKernel
from nemo_star.kernels.triton_kernel import TritonKernel, is_installed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = Heads(4, 2, 16)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program may have (CUDA C++ programming guide, table of compute capabilities)."""

with_triton = pytest.mark.skipif(not is_installed(), reason="Triton is not installed: pip install 'nemo-star[triton]'")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What tests/workers/triton_interpreted.py found, in a process where nothing has imported Triton before."""
    folder = tmp_path_factory.mktemp("triton")
    save_model(folder / "hf", "gpt-oss")
    import_checkpoint(folder / "hf", folder / "checkpoint")
    done = run_tool(ROOT / "tests/workers/triton_interpreted.py", folder / "checkpoint", timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@with_triton
def test_every_case_is_right_in_the_interpreter(report):
    assert len(report["cases"]) >= 30
    assert {name: text for name, text in report["cases"].items() if text} == {}


@with_triton
def test_a_model_with_windows_and_sinks_answers_alike(report):
    by_torch, by_triton = (torch.tensor(logits) for logits in report["logits"])
    torch.testing.assert_close(by_triton, by_torch, atol=1e-4, rtol=1e-4)
    assert not torch.equal(by_triton, by_torch)  # another order of the sums


@pytest.mark.slow
@with_triton
def test_kernels_compile_for_gpus_and_fit():
    done = run_tool(ROOT / "tests/workers/triton_compiled.py", timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["kernel"] for row in rows} == {"decode", "merge"}
    for row in rows:
        assert row["bytes"] > 0
        assert row["shared"] <= SHARED[row["capability"]] * 1024, row
        if row["kernel"] == "decode":
            assert row["own"] == (row["stored"] == "e4m3"), row


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The choice of kernels as on a GPU with Triton; calls of torch's flash attention."""
    asked = []

    def flash(q, k, v, scale, causal, window=None):
        asked.append((q.shape[0], k.shape[0], k.dtype, v.dtype, window))
        return torch.zeros_like(q), torch.zeros(q.shape[:-1])

    monkeypatch.setattr(settling, "kernels_that_run", lambda device, dtype: ["flash", "triton", "math"])
    monkeypatch.setattr("nemo_star.kernels.torch_flash._cuda_flash", flash)
    return asked


@pytest.fixture
def computes(monkeypatch):
    """Triton's decode by the float32 oracle, as if it ran; a function that makes it fail."""
    fate = {}

    def decode(self, q, k, v, scale, causal, window=None):
        if "error" in fate:
            raise fate["error"]
        out, lse = settling.MathKernel().decode(q, k.to(q.dtype), v.to(q.dtype), scale, causal)
        return out + fate.get("off", 0.0), lse

    monkeypatch.setattr(TritonKernel, "decode", decode)
    return lambda **how: fate.update(how)


def test_it_is_taken_by_name_and_is_for_decode(as_on_a_gpu, computes):
    kernel = TritonKernel()
    assert settle(kernel, SIZES, CPU, torch.bfloat16, decode=True) == (kernel, None)
    prefill, told = settle(kernel, SIZES, CPU, torch.bfloat16, decode=False)
    assert (prefill.name, told) == ("flash", None)
    assert settle(FlashKernel(), SIZES, CPU, torch.bfloat16, decode=True)[0].name == "flash"


@pytest.mark.parametrize("kernel", [TEKernel(), FlashKernel(), TritonKernel()], ids=lambda kernel: kernel.name)
def test_float8_is_read_by_it(as_on_a_gpu, computes, kernel):
    how = {"decode": True, "stored": torch.float8_e4m3fn}
    chosen, told = settle(kernel, SIZES, CPU, torch.bfloat16, **how)
    assert (chosen.name, told) == ("triton", None)


def test_float8_is_read_by_torchs_kernel_where_it_does_not_run(as_on_a_gpu, computes, monkeypatch):
    how = {"decode": True, "stored": torch.float8_e4m3fn}
    computes(error=RuntimeError("no compiler"))
    assert settle(FlashKernel(), SIZES, CPU, torch.bfloat16, **how)[0].name == "flash"
    monkeypatch.setattr(settling, "kernels_that_run", lambda device, dtype: ["flash", "math"])
    kernel = FlashKernel()
    assert settle(kernel, SIZES, CPU, torch.bfloat16, **how) == (kernel, None)
    kernel = settling.MathKernel()
    assert settle(kernel, SIZES, CPU, torch.bfloat16, **how) == (kernel, None)


def test_where_it_does_not_come_right_another_is_taken_and_named(as_on_a_gpu, computes):
    computes(off=0.1)
    kernel, told = settle(TritonKernel(), SIZES, CPU, torch.bfloat16, decode=True)
    assert kernel.name == "flash"
    assert told == "attention.kernel=triton does not take this model (its results are wrong): flash instead"
    computes(error=RuntimeError("Failed to find C compiler.\nMore."))
    kernel, told = settle(TritonKernel(), SIZES, CPU, torch.bfloat16, decode=True)
    assert kernel.name == "flash"
    assert "(RuntimeError: Failed to find C compiler.): flash instead" in told
    kernel, told = settle(TritonKernel(), Heads(4, 2, 20), CPU, torch.bfloat16, decode=True)
    assert kernel.name == "math"
    assert "its heads have 20 dimensions" in told


@pytest.mark.parametrize(
    ("sq", "stored", "window"),
    [(33, torch.bfloat16, None), (2, torch.bfloat16, 5), (2, torch.float8_e5m2, 5)],
    ids=["many tokens", "a window", "a window over float8"],
)
def test_what_is_not_for_it_goes_to_torch(as_on_a_gpu, sq, stored, window):
    q, k, v = inputs(sq, 40, dtype=torch.bfloat16)
    TritonKernel(programs=1).decode(q, k.to(stored), v.to(stored), 0.3, True, window)
    assert as_on_a_gpu == [(sq, 40, torch.bfloat16, torch.bfloat16, window)]


def test_what_is_chosen_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(registry, "is_loaded", lambda: False)
    monkeypatch.setattr(registry, "has_triton", lambda: True)
    assert kernels_that_run(CUDA, torch.bfloat16) == ["flash", "triton", "math"]
    assert get_kernel("auto", CUDA, torch.bfloat16).name == "flash"
    assert get_kernel("triton", CUDA, torch.bfloat16).name == "triton"
    assert get_merge("auto", CUDA) is get_merge("triton", CUDA) is merge_by_triton
    assert get_merge("torch", CUDA) is merge_with_sinks
    monkeypatch.setattr(registry, "has_triton", lambda: False)
    assert get_merge("auto", CUDA) is merge_with_sinks
    with pytest.raises(ValueError, match=r"attention.kernel=triton .* \(Triton is not installed: torch's CUDA builds"):
        get_kernel("triton", CUDA, torch.bfloat16)
    with pytest.raises(ValueError, match=r"parallel.merge=triton does not run here \(Triton is not installed"):
        get_merge("triton", CUDA)


def test_what_is_chosen_on_a_cpu():
    assert get_merge("auto", CPU) is get_merge("torch", CPU) is merge_with_sinks
    with pytest.raises(ValueError, match=r"parallel.merge=triton does not run here \(not on cpu\); .*=torch does"):
        get_merge("triton", CPU)
    with pytest.raises(ValueError, match="attention.kernel=triton does not run on cpu"):
        get_kernel("triton", CPU, torch.bfloat16)


def test_a_merge_that_does_not_come_right_is_torchs(monkeypatch):
    assert settle_merge(merge_with_sinks, SIZES, CPU, torch.bfloat16) == (merge_with_sinks, None)
    for fails, why in ((True, "RuntimeError: no compiler"), (False, "its results are wrong")):

        def merge(outs, lses, sinks, dtype, fails=fails):
            if fails:
                raise RuntimeError("no compiler")
            out, lse = merge_with_sinks(outs, lses, sinks, dtype)
            return out + 0.1, lse

        monkeypatch.setattr(settling, "merge_by_triton", merge)
        merged, told = settle_merge(merge, SIZES, CPU, torch.bfloat16)
        assert merged is merge_with_sinks
        assert told == f"parallel.merge=triton does not run here ({why}): torch instead"
    monkeypatch.setattr(settling, "merge_by_triton", right := lambda *given: merge_with_sinks(*given))
    assert settle_merge(right, SIZES, CPU, torch.bfloat16) == (right, None)
