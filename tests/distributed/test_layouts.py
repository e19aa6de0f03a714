"""Sizes that do not divide: layers by stages, vocabulary by tp, contexts by cp; and requests by replicas.

Random Llamas of transformers, whose own logits are what the exact kinds must give.
"""

import pytest
import torch
from launch import generate_many, read_jsonl, selected, write_jsonl
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_star.checkpoint.convert import import_checkpoint

VOCAB = 131  # odd: padded to tp
MODELS = {"3-layers-tied": (3, True), "5-layers": (5, False)}
LENGTHS = (1, 3, 7, 50, 101)
TOKENS = 5
EXACT = {
    "dense": ("dense", 1, 1, 1),
    "dense-tp": ("dense", 2, 1, 1),
    "dense-tp-pp": ("dense", 2, 1, 2),
    "ring": ("ring", 1, 4, 1),
    "ring-pp": ("ring", 1, 2, 2),
    "ring-tp": ("ring", 2, 2, 1),
    "ring-sharded": ("ring", 1, 4, 1),
    "ring-tp-sharded": ("ring", 2, 2, 1),
    "ulysses": ("ulysses", 1, 4, 1),
    "ulysses-pp": ("ulysses", 1, 2, 2),
    "ulysses-tp": ("ulysses", 2, 2, 1),
}
"""Name -> (attention, tp, cp, pp) on four ranks; what remains is data parallel. Decode is replicated but where said."""
SLOW = ("dense", "dense-tp", "ring", "ring-tp", "ulysses")
"""What others do with something on top."""
PAIRS = [
    pytest.param(run, model, marks=pytest.mark.slow if run in SLOW else ())
    for model in MODELS
    for run in EXACT
    if model == "5-layers" or run in ("dense-tp-pp", "ring-pp", "ring-tp-sharded", "ulysses-tp")
]
"""The tied model where its embedding is on another stage or divided."""
MANY = [
    {"id": f"q{i}", "context_ids": [(i + 7 * j * j) % VOCAB for j in range(20 + 9 * i)], "query_ids": [i, 2, 3]}
    for i in range(20)
]


def ids(length, seed):
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = [{"id": str(n), "context_ids": ids(n, n), "query_ids": ids(1 + n % 4, n + 1)} for n in LENGTHS]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> (model of transformers, its converted checkpoint)."""
    made = {}
    for name, (layers, tied) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(layers)
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2}
        config = LlamaConfig(
            vocab_size=VOCAB, num_hidden_layers=layers, initializer_range=0.2, tie_word_embeddings=tied, **shape
        )
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(folder / "hf")
        import_checkpoint(folder / "hf", folder / "checkpoint")
        made[name] = model, folder / "checkpoint"
    return made


def parallel(tp, cp, pp):
    sizes = {"tensor_model": tp, "context": cp, "pipeline_model": pp}
    return [f"parallel.{name}_parallel_size={size}" for name, size in sizes.items()]


@pytest.fixture(scope="module")
def answers(request, models, tmp_path_factory):
    """(run, model) -> (lines, logits by id), all from one launch on four ranks."""
    folder = tmp_path_factory.mktemp("layouts")
    rows, many = write_jsonl(folder / "rows.jsonl", ROWS), write_jsonl(folder / "many.jsonl", MANY)
    runs = {}
    for model, (_, checkpoint) in models.items():
        paths = [f"checkpoint={checkpoint}", f"inference.tokens_to_generate={TOKENS}", "inference.ignore_eos=true"]
        for name in (run for run, of in sorted(selected(request, "run", "model")) if of == model):
            kind, *sizes = EXACT[name]
            runs[name, model] = [*paths, f"input={rows}", f"attention={kind}", *parallel(*sizes)]
            decode = "sharded" if name.endswith("sharded") else "replicated"
            runs[name, model].append(f"parallel.decode={decode}")
    for name, pp in (("dp1", 2), ("dp2", 1)):
        for choice in ("greedy", "sampled"):
            star = ["attention.block_size=32", f"inference={choice}", *parallel(1, 2, pp)]
            runs[name, choice] = [*paths, f"input={many}", *star]
    outputs = {key: folder / "-".join(key) for key in runs}
    for key, arguments in runs.items():
        arguments += [f"output={outputs[key]}.jsonl", f"output_logits={outputs[key]}.safetensors"]
    results = generate_many(4, list(runs.values()), folder)
    assert [result["code"] for result in results] == [0] * len(runs), results
    return {
        key: (read_jsonl(path.with_suffix(".jsonl")), load_file(path.with_suffix(".safetensors")))
        for key, path in outputs.items()
    }


@pytest.mark.parametrize(("run", "model"), PAIRS)
def test_exact_kinds_give_the_logits_of_transformers(answers, models, run, model):
    lines, logits = answers[run, model]
    for row, line in zip(ROWS, lines, strict=True):
        prompt = row["context_ids"] + row["query_ids"]
        with torch.no_grad():
            expected = models[model][0](torch.tensor([prompt + line["token_ids"][:-1]])).logits[0, len(prompt) - 1 :]
        found = logits[f"{row['id']}/logits"]
        assert found.shape == (TOKENS, VOCAB)
        assert (found - expected).abs().max() <= 5e-4
        assert line["token_ids"] == expected.argmax(-1).tolist()
        assert sum(line["stats"]["kv_tokens_per_cp_rank"]) == len(row["context_ids"])


@pytest.mark.parametrize("choice", ["greedy", "sampled"])
def test_replicas_share_requests_and_change_nothing(answers, choice):
    one, two = (
        [{key: value for key, value in line.items() if key != "stats"} for line in answers[name, choice][0]]
        for name in ("dp1", "dp2")
    )
    assert [line["id"] for line in one] == [row["id"] for row in MANY]
    assert one == two
