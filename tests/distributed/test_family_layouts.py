"""Every family in every direction of parallelism, against transformers."""

import pytest
import torch
from family_models import CASES, greedy, save_model, tokens
from launch import generate_many, read_jsonl, selected, write_jsonl
from safetensors.torch import load_file

from nemo_star.checkpoint.convert import import_checkpoint

CONTEXT, QUERY, STEPS = 61, 5, 6
RUNS = {
    "dense-tp-pp": ("dense", 2, 1, 2, "replicated", 1),
    "star-tp": ("star", 2, 2, 1, "replicated", 1),
    "star-tp-sharded": ("star", 2, 2, 1, "sharded", 1),
    "ring-pp": ("ring", 1, 2, 2, "replicated", 1),
    "ulysses": ("ulysses", 1, 2, 2, "sharded", 1),
}
"""Name -> (attention, tp, cp, pp, decode, ep) on four ranks; star has one block, which is exact."""
MIXTURES = ("mixtral", "qwen3-moe", "qwen3-moe-mixed", "glm4-moe", "qwen3-moe-windows", "gpt-oss")
EXPERT_RUNS = {
    "dense-experts-over-tp": ("dense", 2, 1, 2, "replicated", 2),
    "star-experts-over-cp": ("star", 1, 4, 1, "replicated", 4),
    "star-experts-over-cp-tp": ("star", 2, 2, 1, "sharded", 4),
    "ring-experts-over-cp": ("ring", 2, 2, 1, "replicated", 2),
    "ulysses-experts-over-cp": ("ulysses", 1, 2, 2, "sharded", 2),
}
BLOCK_SIZES = (9, 16, 25)
"""Seven blocks, four, three on four ranks: ranks go through them in step, some without any."""


QUICK = "llama-biases mistral ministral3 qwen2 qwen3 phi3-long glm4 mixtral glm4-moe olmo2 gpt-oss gemma3 olmo3".split()
"""One case of each family."""


def pairs():
    """Each case in each direction; what is not slow is one direction of each family, in turn."""
    for number, case in enumerate(CASES):
        for runs in (RUNS, EXPERT_RUNS):
            if runs is RUNS or case in MIXTURES:
                for place, run in enumerate(runs):
                    is_quick = case in QUICK and place == number % len(runs)
                    yield pytest.param(case, run, marks=() if is_quick else pytest.mark.slow)


PAIRS = list(pairs())


def arguments(folder, case, name, run, block_size=CONTEXT):
    attention, tp, cp, pp, decode, ep = run
    out = folder / case / name
    return [
        f"checkpoint={folder / case / 'converted'}",
        f"input={folder / 'in.jsonl'}",
        f"output={out}.jsonl",
        f"output_logits={out}.safetensors",
        f"attention={attention}",
        f"attention.block_size={block_size}",
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.context_parallel_size={cp}",
        f"parallel.pipeline_model_parallel_size={pp}",
        f"parallel.expert_model_parallel_size={ep}",
        f"parallel.decode={decode}",
        f"inference.tokens_to_generate={STEPS}",
        "inference.ignore_eos=true",
    ]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """The folder of outputs; (case, run) -> {"code", "error", ...}; and per case what transformers gives."""
    folder = tmp_path_factory.mktemp("families")
    context, query = tokens(CONTEXT, seed=5), tokens(QUERY, seed=6)
    write_jsonl(folder / "in.jsonl", [{"id": "a", "context_ids": context, "query_ids": query}])
    expected, runs = {}, {}
    for case in {case for case, _ in selected(request, "case", "run")} | {"glm4-moe"}:
        model = save_model(folder / case / "hf", case)
        import_checkpoint(folder / case / "hf", folder / case / "converted")
        expected[case] = greedy(model, context + query, STEPS)
    for case, name in sorted(selected(request, "case", "run")):
        runs[case, name] = arguments(folder, case, name, {**RUNS, **EXPERT_RUNS}[name])
    for size in BLOCK_SIZES:
        for name, cp, pp, ep in (("together", 4, 1, 4), ("alone", 4, 1, 1), ("staged", 2, 2, 2)):
            run = ("star", 1, cp, pp, "replicated", ep)
            runs[f"{name}-{size}"] = arguments(folder, "glm4-moe", f"{name}-{size}", run, size)
    done = dict(zip(runs, generate_many(4, list(runs.values()), folder), strict=True))
    return folder, done, expected


@pytest.mark.parametrize(("case", "run"), PAIRS)
def test_logits_and_tokens_are_those_of_transformers(results, case, run):
    folder, done, expected = results
    assert done[case, run]["code"] == 0, done[case, run]["error"]
    token_ids, logits = expected[case]
    assert read_jsonl(folder / case / f"{run}.jsonl")[0]["token_ids"] == token_ids
    stored = load_file(folder / case / f"{run}.safetensors")["a/logits"]
    torch.testing.assert_close(stored, logits, atol=5e-4, rtol=0)


@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("name", ["together", "staged"])
def test_star_does_not_depend_on_where_experts_are(results, name, size):
    folder, done, _ = results
    runs = (f"{name}-{size}", f"alone-{size}")
    assert [done[run]["code"] for run in runs] == [0, 0], [done[run]["error"] for run in runs]
    one, other = (load_file(folder / "glm4-moe" / f"{run}.safetensors")["a/logits"] for run in runs)
    torch.testing.assert_close(one, other, atol=5e-4, rtol=0)
