"""Star with several blocks, and exact attention, against transformers under masks: full and windowed layers, sinks."""

import pytest
import torch
from family_models import greedy, save_model, tokens
from launch import generate_many, read_jsonl, selected, write_jsonl
from safetensors.torch import load_file
from star_masks import star_greedy

from nemo_star.checkpoint.convert import import_checkpoint

CONTEXT, QUERY, STEPS = 61, 5, 4
FAMILIES = ("llama-yarn", "gpt-oss", "gemma3", "olmo3", "qwen2-windows", "mistral-windows")
"""Without windows; with windows in some layers, of 16, 8, 12 and 12 tokens; in all, of 16."""
QUICK = ("gpt-oss",)
SHAPES = {
    "even": (16, 16),
    "short last block": (25, 25),
    "a last block of one token": (20, 20),
    "shorter than windows": (7, 7),
    "small anchor": (20, 6),
    "overlap": (20, 6, 9),
    "overlap, shorter than windows": (7, 3, 5),
    "overlap of a block": (16, 4, 16),
    "one block": (CONTEXT, CONTEXT),
}
"""Name -> block and anchor size, and what blocks overlap with: 4, 3, 4, 9, 4, 4, 9, 4 and 1 blocks."""
SHORT = ("a last block of one token", "shorter than windows", "small anchor", "overlap, shorter than windows")
RUNS = {
    1: [
        *(("star", shape, "shared", (1, 1, 1), "replicated") for shape in SHAPES),
        ("star", "even", "recompute", (1, 1, 1), "replicated"),
        ("star", "small anchor", "recompute", (1, 1, 1), "replicated"),
        ("star", "overlap", "recompute", (1, 1, 1), "replicated"),
        ("dense", "one block", "shared", (1, 1, 1), "replicated"),
    ],
    2: [
        *(("star", shape, "shared", (1, 2, 1), "replicated") for shape in ("short last block", *SHORT)),
        ("star", "shorter than windows", "recompute", (1, 2, 1), "sharded"),
        ("star", "overlap", "shared", (1, 2, 1), "replicated"),
        ("star", "overlap of a block", "recompute", (1, 2, 1), "sharded"),
        ("star", "overlap", "shared", (2, 1, 1), "replicated"),
        ("star", "short last block", "shared", (2, 1, 1), "replicated"),
        ("star", "small anchor", "shared", (1, 1, 2), "replicated"),
        ("ring", "one block", "shared", (1, 2, 1), "replicated"),
        ("ulysses", "one block", "shared", (1, 2, 1), "sharded"),
    ],
    3: [
        *(("star", shape, "shared", (1, 3, 1), "replicated") for shape in SHORT),
        ("star", "short last block", "recompute", (1, 3, 1), "sharded"),
        ("star", "overlap of a block", "shared", (1, 3, 1), "replicated"),
        ("ring", "one block", "shared", (1, 3, 1), "sharded"),
    ],
    4: [
        ("star", "shorter than windows", "shared", (1, 4, 1), "replicated"),
        ("star", "short last block", "shared", (1, 4, 1), "sharded"),
        ("star", "small anchor", "recompute", (1, 4, 1), "replicated"),
        ("star", "a last block of one token", "shared", (2, 2, 1), "sharded"),
        ("star", "shorter than windows", "shared", (1, 2, 2), "replicated"),
        ("star", "small anchor", "recompute", (1, 2, 2), "sharded"),
        ("star", "overlap", "recompute", (1, 2, 2), "replicated"),
        ("star", "overlap, shorter than windows", "shared", (1, 4, 1), "sharded"),
        ("ring", "one block", "shared", (2, 2, 1), "replicated"),
        ("ring", "one block", "shared", (1, 2, 2), "sharded"),
        ("ulysses", "one block", "shared", (1, 2, 2), "replicated"),
        ("dense", "one block", "shared", (2, 1, 2), "replicated"),
    ],
}
"""Processes -> (attention, shape, anchor, (tp, cp, pp), decode)."""


def name_of(family, run):
    attention, shape, anchor, layout, decode = run
    words = shape.replace(",", "").replace(" ", "_")
    return f"{family}-{attention}-{words}-{anchor}-{'x'.join(map(str, layout))}-{decode}"


def arguments(folder, family, run):
    attention, shape, anchor, (tp, cp, pp), decode = run
    block, anchor_size, *overlap = SHAPES[shape]
    out = folder / name_of(family, run)
    return [
        f"checkpoint={folder / family / 'converted'}",
        f"input={folder / 'in.jsonl'}",
        f"output={out}.jsonl",
        f"output_logits={out}.safetensors",
        f"attention={attention}",
        f"attention.block_size={block}",
        f"attention.anchor_size={anchor_size}",
        *(f"attention.overlap_size={size}" for size in overlap),
        f"attention.anchor={anchor}",
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.context_parallel_size={cp}",
        f"parallel.pipeline_model_parallel_size={pp}",
        f"parallel.decode={decode}",
        f"inference.tokens_to_generate={STEPS}",
        "inference.ignore_eos=true",
    ]


@pytest.fixture(scope="module")
def expected(request, tmp_path_factory):
    """The folder of converted models, and (family, shape) -> (tokens, logits)."""
    folder = tmp_path_factory.mktemp("star-masks")
    context, query = tokens(CONTEXT, seed=7), tokens(QUERY, seed=8)
    write_jsonl(folder / "in.jsonl", [{"id": "a", "context_ids": context, "query_ids": query}])
    answers = {}
    for family in sorted(selected(request, "family")):
        model = save_model(folder / family / "hf", family).double()
        import_checkpoint(folder / family / "hf", folder / family / "converted")
        for shape, sizes in SHAPES.items():
            settings = dict(zip(("block", "anchor", "overlap"), sizes, strict=False))
            answers[family, shape] = star_greedy(model, context, query, STEPS, **settings)
        plain = greedy(model, context + query, STEPS)
        torch.testing.assert_close(answers[family, "one block"][1], plain[1], atol=1e-6, rtol=0)
        blocks = answers[family, "short last block"][1]
        assert torch.equal(blocks, answers[family, "one block"][1]) == (family == "mistral-windows")
        apart, together = (answers[family, shape][1] for shape in ("small anchor", "overlap"))
        assert torch.allclose(apart, together, atol=1e-4, rtol=0) == (family == "mistral-windows")
    return folder, answers


@pytest.fixture(scope="module", params=RUNS)
def done(request, expected):
    """Processes, and by name what became of each run on them."""
    folder, _ = expected
    families = sorted(selected(request, "family"))
    runs = {(family, run): arguments(folder, family, run) for family in families for run in RUNS[request.param]}
    return dict(zip(runs, generate_many(request.param, list(runs.values()), folder), strict=True))


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in QUICK else pytest.mark.slow) for family in FAMILIES]
)
def test_logits_and_tokens_are_those_under_masks(expected, done, family):
    folder, answers = expected
    for (of, run), result in done.items():
        if of != family:
            continue
        name = name_of(family, run)
        assert result["code"] == 0, f"{name}: {result['error']}"
        token_ids, logits = answers[family, run[1]]
        stored = load_file(folder / f"{name}.safetensors")["a/logits"]
        worst = float((stored.double() - logits).abs().max())
        assert worst <= 5e-4, f"{name}: logits {worst} apart"
        assert read_jsonl(folder / f"{name}.jsonl")[0]["token_ids"] == token_ids, name
