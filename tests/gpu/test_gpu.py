"""What needs a GPU, in one call: pytest -m gpu. Kernels are also tried on CPU, where there is one, by the same tests.

A kernel in 16 bits may be off a float64 oracle by at most twice what torch's own attention in that type is off.
"""

import json
import sys

import pytest
import torch
from golden import CASES, FEW, TOLERANCE, check, run_cases, settings
from launch import ROOT, generate_many, read_jsonl, torchrun, write_jsonl
from oracle import reference
from safetensors.torch import load_file

from nemo_star.attention.cache import KVCache
from nemo_star.kernels import stored
from nemo_star.kernels.registry import get_kernel
from nemo_star.kernels.settle import Heads, settle
from nemo_star.kernels.triton_kernel import is_installed
from nemo_star.models.rotary_pieces import rotate_in_pieces

KERNELS = ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("math", "flash", "te", "triton"))]
SHAPES = [(1, 1), (7, 7), (1, 300), (33, 97), (64, 192), (256, 256), (128, 1024)]
"""Query and key lengths; more keys than queries are an anchor, or a cache."""
HEADS = [(8, 8), (8, 2), (4, 1)]
LEAST_ALLOWED = 1e-4


@pytest.fixture(params=KERNELS)
def kernel_on(request, monkeypatch, transformer_engine):
    """(kernel, its device)."""
    device = torch.device("cpu" if request.param == "cpu" else "cuda")
    if request.param == "te":
        found, package = transformer_engine
        if found.state != "working":
            pytest.skip(found.told())
        monkeypatch.setitem(sys.modules, "transformer_engine", package)
    if request.param == "triton" and not is_installed():
        pytest.skip("Triton is not installed")
    return get_kernel(request.param, device, torch.bfloat16), device


def inputs(sq, sk, heads=8, groups=2, *, device, dtype=torch.bfloat16, channels=64, batch=1):
    generator = torch.Generator().manual_seed(sq * 1000 + sk)
    shapes = ((sq, batch, heads, channels), (sk, batch, groups, channels), (sk, batch, groups, channels))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


class Oracle:
    """out and lse in float64 for one input, and how far torch's own attention is off."""

    def __init__(self, q, k, v, scale, causal, window=None):
        self.out, self.lse = reference(q.cpu(), k.cpu(), v.cpu(), scale, causal, window)
        self.dtype = q.dtype
        self.own = self._errors(torch_attention(q, k, v, scale, causal, window))

    def _errors(self, out):
        """Root mean square, and largest."""
        error = out.cpu().double() - self.out
        return error.square().mean().sqrt().item(), error.abs().max().item()

    def check(self, out):
        """At most twice torch's error; the largest, that of one number, may also be off by one rounding of the type."""
        (mean, largest), (own_mean, own_largest) = self._errors(out), self.own
        assert mean <= max(2 * own_mean, LEAST_ALLOWED)
        assert largest <= 2 * own_largest + torch.finfo(self.dtype).eps * self.out.abs().max()


def torch_attention(q, k, v, scale, causal, window=None):
    """torch's own in the type of the inputs, [sq, b, np, hn]."""
    sq, sk, repeats = q.shape[0], k.shape[0], q.shape[2] // k.shape[2]
    mask = torch.ones(sq, sk, dtype=torch.bool, device=q.device).tril(sk - sq) if causal else None
    if window is not None:
        mask = mask.triu(sk - sq - window + 1)
    batch_first = [x.permute(1, 2, 0, 3) for x in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2))]
    own = torch.nn.functional.scaled_dot_product_attention(*batch_first, attn_mask=mask, scale=scale)
    return own.permute(2, 0, 1, 3)


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize(("sq", "sk"), SHAPES)
@pytest.mark.parametrize("channels", [64, 128])
def test_prefill_is_as_good_as_torch(kernel_on, heads, groups, sq, sk, channels):
    kernel, device = kernel_on
    q, k, v = inputs(sq, sk, heads, groups, device=device, channels=channels)
    out = kernel.prefill(q, k, v, 0.125)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    Oracle(q, k, v, 0.125, True).check(out)


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize(("sq", "sk"), SHAPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_and_its_lse_are_as_good_as_torch(kernel_on, heads, groups, sq, sk, causal, dtype):
    kernel, device = kernel_on
    q, k, v = inputs(sq, sk, heads, groups, device=device, dtype=dtype, channels=128, batch=2)
    oracle = Oracle(q, k, v, 0.09, causal)
    out, lse = kernel.decode(q, k, v, 0.09, causal)
    assert out.dtype == lse.dtype == torch.float32
    oracle.check(out)
    assert (lse.cpu().double() - oracle.lse).abs().max() <= 1e-3


@pytest.mark.parametrize("window", [1, 16, 128])
@pytest.mark.parametrize(("sq", "sk"), [(1, 300), (33, 97), (64, 64), (300, 427), (700, 700)])
def test_windows_are_as_good_as_torch(kernel_on, sq, sk, window):
    kernel, device = kernel_on
    q, k, v = inputs(sq, sk, device=device)
    oracle = Oracle(q, k, v, 0.125, True, window)
    oracle.check(kernel.prefill(q, k, v, 0.125, window))
    out, lse = kernel.decode(q, k, v, 0.125, True, window)
    oracle.check(out)
    assert (lse.cpu().double() - oracle.lse).abs().max() <= 1e-3


def test_no_keys_give_no_share(kernel_on):
    kernel, device = kernel_on
    out, lse = kernel.decode(*inputs(3, 0, device=device), 0.125, False)
    assert not out.any()
    assert lse.isneginf().all()


def test_views_of_larger_buffers_do(kernel_on):
    """A cache's views, and keys that lie between others' in memory."""
    kernel, device = kernel_on
    q, k, v = inputs(5, 64, device=device)
    cache = KVCache(capacity=1000)
    cache.append(1, k, v)
    interleaved = torch.stack((k, v), dim=3)[:, :, :, :1].squeeze(3), torch.stack((v, k), dim=2)[:, :, 0]
    expected = kernel.decode(q, k, v, 0.125, True)
    torch.testing.assert_close(kernel.decode(q, *cache.get(1), 0.125, True), expected)
    torch.testing.assert_close(kernel.decode(q, *interleaved, 0.125, True), expected)
    torch.testing.assert_close(kernel.prefill(q, *interleaved, 0.125), kernel.prefill(q, k, v, 0.125))
    later = kernel.prefill(q[1:], k[1:], v[1:], 0.125)
    torch.testing.assert_close(later, kernel.prefill(*(x[1:].clone() for x in (q, k, v)), 0.125))


def test_merged_parts_are_the_whole(kernel_on):
    """The kernel's lse is what the merge takes it for: parts of the keys, merged, are attention over all of them."""
    from nemo_star.kernels.merge import merge_partials

    kernel, device = kernel_on
    q, k, v = inputs(6, 900, device=device)
    parts = [kernel.decode(q, k[start:stop], v[start:stop], 0.125, False) for start, stop in ((0, 500), (500, 900))]
    out, _ = merge_partials(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))
    Oracle(q, k, v, 0.125, False).check(out)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_a_cache_in_fp8(kernel_on, monkeypatch, name):
    """A device writes what a CPU does, beyond the largest value, too; attention over pieces is that over all."""
    kernel, device = kernel_on
    q, k, v = inputs(3, 900, device=device)
    monkeypatch.setitem(stored.PIECE_BYTES, device.type, 256 * 2 * k[0].nbytes)
    cache, same = KVCache(stored.stored_type(name)), KVCache(stored.stored_type(name))
    for layer, factor in ((1, 1), (2, 200), (3, 2**15), (4, 2**-10)):
        cache.append(layer, k * factor, v * factor)
        same.append(layer, (k * factor).cpu(), (v * factor).cpu())
        for mine, other in zip(cache.get(layer), same.get(layer), strict=True):
            assert torch.equal(mine.cpu().view(torch.uint8), other.view(torch.uint8))
    kept = cache.get(1)
    out, lse = stored.attend_stored(kernel, q, *kept, 0.125, True)
    oracle = Oracle(q, *(x.to(q.dtype) for x in kept), 0.125, True)
    oracle.check(out)
    assert (lse.cpu().double() - oracle.lse).abs().max() <= 1e-3


@pytest.fixture
def te_package(monkeypatch, transformer_engine):
    """A working Transformer Engine, to be imported from in the test."""
    found, package = transformer_engine
    if found.state != "working":
        pytest.skip(found.told())
    monkeypatch.setitem(sys.modules, "transformer_engine", package)


@pytest.mark.gpu
def test_lengths_that_grow_during_decode(te_package):
    """A token at a time over K that grows by one, then several at a time: no length is special, none is planned for."""
    device = torch.device("cuda")
    sizes = Heads(heads=32, groups=8, channels=128)
    prefill, decode = (
        settle(get_kernel("te", device, torch.bfloat16), sizes, device, torch.bfloat16, decode=decode)
        for decode in (False, True)
    )
    assert (prefill[0].name, decode[0].name) == ("te", "flash"), (prefill, decode)
    assert prefill[1] is decode[1] is None
    for sq, lengths in ((1, range(250, 260)), (5, range(1020, 1030))):
        for sk in lengths:
            q, k, v = inputs(sq, sk, 32, 8, device=device, channels=128)
            oracle = Oracle(q, k, v, 0.09, True)
            out, lse = decode[0].decode(q, k, v, 0.09, True)
            oracle.check(out)
            assert (lse.cpu().double() - oracle.lse).abs().max() <= 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "tokens"), [("k", 349_526 + 200), ("q", 524_288 + 200)])
@torch.inference_mode()
def test_blocks_above_the_rotary_overflow(te_package, name, tokens):
    """Llama 3.1 8B at tp 1: K as a view of the fused QKV, Q as a tensor of its own; 4.3 GB each."""
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    shape, part = {"k": ((tokens, 1, 8, 6, 128), 4), "q": ((tokens, 1, 32, 1, 128), 0)}[name]
    t = torch.randn(shape, dtype=torch.bfloat16, device="cuda")[:, :, :, part]
    angles = torch.rand(tokens, 1, 1, 128, device="cuda") * 6
    angles[..., 64:] = angles[..., :64]
    assert tokens * t.stride(0) > 2**31  # the last tokens lie beyond
    starts = (0, tokens // 2, tokens - 400, tokens - 200)
    rows = torch.cat([torch.arange(start, start + 200, device="cuda") for start in starts])
    before = t[rows].float()
    first, second = before.chunk(2, dim=-1)
    expected = before * angles[rows].cos() + torch.cat((-second, first), dim=-1) * angles[rows].sin()
    rotate_in_pieces(lambda t, angles: apply_rotary_pos_emb(t, angles, tensor_format="sbhd", fused=True), t, angles)
    torch.testing.assert_close(t[rows].float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_recorded_answers_on_one_gpu(tiny, tmp_path, golden_logits):
    """Star, recomputed anchors, dense through tools/generate.py with NCCL: float32, as on CPU; the same with decode
    steps as CUDA graphs."""
    exact = ["attention.kernel=math", "dtype=float32"]
    runs = [("star", {}), ("recompute", {"anchor": "recompute"})]
    star = [case for case in CASES if case["id"] in FEW]
    dense = [case for case in CASES if case["attn"] == "dense"][:1]
    labelled = [
        (f"{case['id']}:{label}", settings(case, (1, 1, 1), **changes) + exact, case)
        for label, changes in runs
        for case in star
    ]
    labelled += [(case["id"], settings(case, (1, 1, 1)) + exact, case) for case in dense]
    graph = [*exact, "decode.cuda_graph=true"]
    labelled += [(f"{case['id']}:graph", settings(case, (1, 1, 1)) + graph, case) for case in star]
    answers = run_cases(1, labelled, tiny, tmp_path, gpu=True)
    for label, _, case in labelled:
        check(answers[label], case, golden_logits)


@pytest.mark.gpu
def test_cuda_graphs_give_the_plain_path_s_tokens(demo, tmp_path):
    """Six questions decode together in bfloat16, by torch's flash attention: answers end one by one, so that several
    sets of sequences are recorded."""
    query = "The special magic number for easy-canyon mentioned in the provided text is"
    context = (ROOT / "assets/demo_document.txt").read_text()
    queries = [query, query + " 2", query.replace("easy-canyon", "nowhere"), "The", "The special", "magic number"]
    rows = [{"id": str(i), "context": context, "query": text} for i, text in enumerate(queries)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    common = [f"checkpoint={demo}", f"input={source}", "attention.kernel=flash", "dtype=bfloat16"]
    common += ["inference.tokens_to_generate=48"]
    outputs = {name: tmp_path / f"{name}.jsonl" for name in ("plain", "graph")}
    runs = [[*common, f"output={outputs['plain']}"], [*common, f"output={outputs['graph']}", "decode.cuda_graph=true"]]
    results = generate_many(1, runs, tmp_path, gpu=True)
    assert [result["code"] for result in results] == [0, 0], results
    assert "decode steps recorded" in results[1]["stderr"]
    plain, graph = ([line["token_ids"] for line in read_jsonl(path)] for path in outputs.values())
    assert graph == plain


@pytest.mark.gpu
@pytest.mark.parametrize(("processes", "layouts"), [(2, [(1, 2), (2, 1)]), (4, [(2, 2), (1, 4)])])
def test_several_ranks_on_one_gpu(tiny, tmp_path, processes, layouts):
    """gloo's collectives on CUDA tensors, because NCCL refuses two ranks on a device: star and Ulysses, tp and cp."""
    check_ranks(tiny, tmp_path, processes, layouts, gpu=True)


def check_ranks(checkpoint, folder, processes, layouts, gpu):
    arguments = (checkpoint, folder / "report.json", json.dumps(layouts))
    done = torchrun(processes, ROOT / "tests/workers/gpu_ranks.py", *arguments, gpu=gpu, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report.json").read_text())
    assert {row["device"] for row in report} == {"cuda" if gpu else "cpu"}
    assert {(row["tp"], row["cp"]) for row in report} == set(layouts)
    assert all(row["same_tokens"] for row in report), report
    assert max(row["difference"] for row in report) <= TOLERANCE, report


@pytest.mark.gpu
def test_transformer_engine_layers_and_megatrons_own_agree(tiny, tmp_path, golden_logits, transformer_engine):
    """One checkpoint in bfloat16: Transformer Engine's layers and kernel err at most twice as much as without it."""
    if transformer_engine[0].state != "working":
        pytest.skip(transformer_engine[0].told())
    hidden = tmp_path / "packages"
    (hidden / "transformer_engine").mkdir(parents=True)
    (hidden / "transformer_engine/__init__.py").write_text("raise ImportError('left out by a test')")
    errors = {}
    by_torch = ["decode.torch_linears=true"]
    for name, packages, more in (("te", None, []), ("te-linears", None, by_torch), ("flash", hidden, [])):
        folder = tmp_path / name
        folder.mkdir()
        kernel = "flash" if packages else "prefill te, decode flash"
        errors[name] = first_token_errors(tiny, folder, kernel, packages, golden_logits, more)
    assert max(errors["te"], errors["te-linears"]) <= max(2 * errors["flash"], 1e-2), errors


def first_token_errors(checkpoint, folder, kernel, packages, golden_logits, more):
    """Largest error of the first token's logits against the recorded float32 ones, over a few cases.

    Args:
        more: overrides.
    """
    cases = [case for case in CASES if case["id"] in FEW and case["world_size"] == 1]
    worst = 0.0
    for case in cases:
        row = {"id": case["id"], "context_ids": case["context_ids"], "query_ids": case["query_ids"]}
        source, logits = write_jsonl(folder / "in.jsonl", [row]), folder / "logits.safetensors"
        run = [f"checkpoint={checkpoint}", f"input={source}", f"output_logits={logits}", "overwrite=true"]
        (result,) = generate_many(1, [[*run, *settings(case), *more]], folder, gpu=True, packages=packages)
        assert result["code"] == 0, result
        assert f"kernel {kernel}, bfloat16" in result["stderr"]
        first = load_file(logits)[f"{case['id']}/logits"][0]
        worst = max(worst, (first - golden_logits[f"{case['id']}/logits"][0]).abs().max().item())
    return worst


@pytest.mark.multigpu
@pytest.mark.parametrize("layout", [(1, 2, 1), (2, 1, 1), (1, 1, 2)], ids=["cp", "tp", "pp"])
def test_recorded_answers_on_two_gpus(tiny, tmp_path, golden_logits, layout):
    """NCCL: context, tensor (with sequence parallelism, too) and pipeline parallelism; where there is one stage, also
    with its collectives in CUDA graphs."""
    exact = ["attention.kernel=math", "dtype=float32"]
    settings_by_label = {"plain": exact}
    if layout[2] == 1:
        settings_by_label["graph"] = [*exact, "decode.cuda_graph=true"]
    if layout[0] > 1:
        settings_by_label["sequence-parallel"] = [*exact, "parallel.sequence_parallel=true"]
    labelled = [
        (f"{case['id']}:{label}", settings(case, layout) + more, case)
        for label, more in settings_by_label.items()
        for case in CASES
        if case["id"] in FEW
    ]
    answers = run_cases(2, labelled, tiny, tmp_path, gpu=True)
    for label, _, case in labelled:
        check(answers[label], case, golden_logits)


@pytest.mark.parametrize(
    "gpu",
    [
        pytest.param(True, marks=pytest.mark.multigpu(4), id="nccl"),
        pytest.param(False, marks=pytest.mark.slow, id="gloo"),
    ],
)
def test_recorded_answers_with_tensor_and_context_parallelism(tiny, tmp_path, golden_logits, gpu):
    """tp 2 x cp 2, groups of both kinds at work in each layer: anchors shared and recomputed, decode divided over both,
    ring; with NCCL sequence parallelism, too. On CPU with gloo the same code."""
    exact, layout = ["attention.kernel=math", "dtype=float32"], (2, 2, 1)
    runs = {
        "shared": (exact, {}),
        "recompute": (exact, {"anchor": "recompute"}),
        "sharded": ([*exact, "parallel.decode=sharded"], {}),
    }
    if gpu:
        runs["sequence-parallel"] = ([*exact, "parallel.sequence_parallel=true"], {})
    labelled = [
        (f"{case['id']}:{label}", settings(case, layout, **changes) + more, case)
        for label, (more, changes) in runs.items()
        for case in CASES
        if case["id"] in FEW
    ]
    ring = next(case for case in CASES if case["attn"] == "ring")
    labelled.append((f"{ring['id']}:ring", settings(ring, layout) + exact, ring))
    answers = run_cases(4, labelled, tiny, tmp_path, gpu=gpu)
    for label, _, case in labelled:
        check(answers[label], case, golden_logits)
