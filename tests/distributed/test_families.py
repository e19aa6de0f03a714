"""Every family in every direction of parallelism, against transformers."""

import pytest
import torch
from family_models import CASES, greedy, save_model, tokens
from launch import generate_many, read_jsonl, write_jsonl
from safetensors.torch import load_file

from nemo_star.checkpoint.convert import import_checkpoint

CONTEXT, QUERY, STEPS = 61, 5, 6
RUNS = {
    "dense-tp-pp": ("dense", 2, 1, 2, "replicated"),
    "star-tp": ("star", 2, 2, 1, "replicated"),
    "star-tp-sharded": ("star", 2, 2, 1, "sharded"),
    "ring-pp": ("ring", 1, 2, 2, "replicated"),
    "ulysses": ("ulysses", 1, 2, 2, "sharded"),
}
"""Name -> (attention, tp, cp, pp, decode) on four ranks; star has one block, which is exact."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(case, run) -> {"code", "error", ...}, row, logits; and per case what transformers gives."""
    folder = tmp_path_factory.mktemp("families")
    context, query = tokens(CONTEXT, seed=5), tokens(QUERY, seed=6)
    write_jsonl(folder / "in.jsonl", [{"id": "a", "context_ids": context, "query_ids": query}])
    expected, runs, names = {}, [], []
    for case in CASES:
        model = save_model(folder / case / "hf", case)
        import_checkpoint(folder / case / "hf", folder / case / "converted")
        expected[case] = greedy(model, context + query, STEPS)
        for run, (attention, tp, cp, pp, decode) in RUNS.items():
            names.append((case, run))
            out = folder / case / run
            runs.append(
                [
                    f"checkpoint={folder / case / 'converted'}",
                    f"input={folder / 'in.jsonl'}",
                    f"output={out}.jsonl",
                    f"output_logits={out}.safetensors",
                    f"attention={attention}",
                    f"attention.block_size={CONTEXT}",
                    f"parallel.tensor_model_parallel_size={tp}",
                    f"parallel.context_parallel_size={cp}",
                    f"parallel.pipeline_model_parallel_size={pp}",
                    f"parallel.decode={decode}",
                    f"inference.tokens_to_generate={STEPS}",
                    "inference.ignore_eos=true",
                ]
            )
    done = dict(zip(names, generate_many(4, runs, folder), strict=True))
    return folder, done, expected


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_tokens_are_those_of_transformers(results, case, run):
    folder, done, expected = results
    assert done[case, run]["code"] == 0, done[case, run]["error"]
    token_ids, logits = expected[case]
    assert read_jsonl(folder / case / f"{run}.jsonl")[0]["token_ids"] == token_ids
    stored = load_file(folder / case / f"{run}.safetensors")["a/logits"]
    torch.testing.assert_close(stored, logits, atol=5e-4, rtol=0)
