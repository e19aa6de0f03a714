"""K/V in fp8 on two ranks against transformers over a cache that rounds: methods, layouts, windows and sinks, contexts
that go on, several questions in a step; what two ranks saved, one loads."""

import json

import pytest
import torch
from family_models import save_model, tokens
from fp8_oracle import Oracle
from launch import ROOT, forked, selected
from safetensors.torch import load_file

from nemo_star import LLM
from nemo_star.checkpoint.convert import import_checkpoint
from nemo_star.contexts.index import read_index
from nemo_star.contexts.storage import load_context
from nemo_star.engine.engine import finished

MODELS = {
    "llama-biases": {"initializer_range": 0.1},
    "gpt-oss": {"initializer_range": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}
"""Case -> changes. Small weights: a value in the middle between two of fp8's may be rounded to either, by float32 or
float64, and must not matter. No YaRN: transformers rounds K with its factor, which is in our queries."""
STAR, E4M3, E5M2 = {"kind": "star", "block_size": 16}, "fp8_e4m3", "fp8_e5m2"
CASES = {
    "star": ("llama-biases", STAR, E4M3, (1, 2, 1)),
    "star, windows and sinks": ("gpt-oss", STAR, E4M3, (1, 2, 1)),
    "star, e5m2": ("llama-biases", STAR, E5M2, (1, 2, 1)),
    "ring": ("llama-biases", {"kind": "ring"}, E4M3, (1, 2, 1)),
    "ulysses, sharded": ("gpt-oss", {"kind": "ulysses"}, E4M3, (1, 2, 1)),
    "dense, tp": ("llama-biases", {"kind": "dense"}, E4M3, (2, 1, 1)),
    "star, pp": ("gpt-oss", STAR, E4M3, (1, 1, 2)),
}
"""Name -> model, attention, cache.dtype, (tp, cp, pp)."""
QUICK = ("star, windows and sinks", "ring")
LOADED = ("star", "star, windows and sinks", "star, e5m2", "ring")


def marked(names):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


CONTEXT, MORE, STEPS = tokens(61, 7), tokens(40, 9), 4
QUERIES = [tokens(5, 8), tokens(1, 10), tokens(9, 11)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Case -> (transformers' model in float64, the converted checkpoint)."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for name, changes in MODELS.items():
        model = save_model(folder / "hf" / name, name, **changes).double()
        import_checkpoint(folder / "hf" / name, folder / name)
        found[name] = model, folder / name
    return found


@pytest.fixture(scope="module")
def done(request, models, tmp_path_factory):
    """Case -> (what the worker found, logits at once and gone on, the folder of the saved context)."""
    folder, requests = tmp_path_factory.mktemp("fp8"), []
    cases = [case for case in CASES if case in selected(request, "case") | set(QUICK)]
    for name in cases:
        model, attention, dtype, (tp, cp, pp) = CASES[name]
        sizes = {"tensor_model": tp, "context": cp, "pipeline_model": pp}
        parallel = {f"{key}_parallel_size": size for key, size in sizes.items()}
        parallel["decode"] = "sharded" if "sharded" in name else "replicated"
        values = {"ids": CONTEXT, "more": MORE, "queries": QUERIES, "steps": STEPS, "cache": {"dtype": dtype}}
        place = {"checkpoint": str(models[model][1]), "folder": str(folder / name)}
        requests.append({**values, **place, "attention": attention, "parallel": parallel})
    (folder / "requests.json").write_text(json.dumps(requests))
    output = folder / "found.json"
    result = forked(2, ROOT / "tests/workers/fp8_cache.py", folder / "requests.json", output)
    assert result.returncode == 0, result.stderr
    logits = load_file(f"{output}.logits")
    return {
        name: (found, [logits[f"{number}/{turn}"] for turn in range(2)], folder / name)
        for number, (name, found) in enumerate(zip(cases, json.loads(output.read_text()), strict=True))
    }


@pytest.fixture(scope="module")
def expected(models):
    """(model, block size, type) -> tokens and logits of all questions at once and gone on, counted once."""
    known = {}

    def answers(model, block, dtype):
        key = model, block, dtype
        if key not in known:
            oracle, known[key] = Oracle(models[model][0], CONTEXT, name=dtype, block=block), []
            for more in (None, MORE):
                if more:
                    oracle.go_on(more)
                said = [oracle.greedy(query, STEPS) for query in QUERIES]
                known[key].append(([ids for ids, _ in said], torch.stack([rows for _, rows in said])))
        return known[key]

    return answers


@pytest.mark.parametrize("case", marked(CASES))
def test_answers_are_those_over_rounded_keys_and_values(models, expected, done, case):
    model, attention, dtype, _ = CASES[case]
    found, logits, _ = done[case]
    right = expected(model, attention.get("block_size"), dtype)
    for turn, (said, rows) in enumerate(right):
        assert found["tokens"][turn] == said
        assert (logits[turn] - rows).abs().max() <= 5e-4
    plain = expected(model, attention.get("block_size"), None)
    assert (right[0][1][:, 0] - plain[0][1][:, 0]).abs().max() > 5e-3  # rounding can be seen


@pytest.mark.parametrize("case", marked(LOADED))
def test_what_two_ranks_saved_one_loads_and_goes_on_with(models, expected, done, case):
    """The same bits; the same answers."""
    model, attention, dtype, _ = CASES[case]
    folder = done[case][2]
    alone = attention if attention["kind"] == "star" else {"kind": "dense"}
    engine = LLM(models[model][1], attention=alone, cache={"dtype": dtype}).engine
    loaded = load_context(engine, folder, fingerprint="weights", verify=True)
    index = read_index(folder)
    assert index.dtype == dtype
    assert len(index.shards) == 2
    assert loaded.cache.nbytes == sum(x.numel() for n in engine.stage.layer_numbers for x in loaded.cache.get(n))
    for shard in index.shards:
        saved = load_file(folder / index.data / shard.file)
        for number in set(shard.layer_numbers) - set(engine.stage.windowed_layer_numbers):
            k = loaded.cache.get(number)[0].view(torch.uint8)
            rows = torch.cat([k[start:stop, 0] for start, stop in shard.spans])
            assert torch.equal(rows, saved[f"k.{number}"].view(torch.uint8))
    right = expected(model, attention.get("block_size"), dtype)
    for turn, (_, rows) in enumerate(right):
        if turn:
            finished(engine.extend(loaded, MORE))
        for query, answer in zip(QUERIES, rows, strict=True):
            first = engine.decode([(engine.sequence(loaded), query)])[0]
            assert (first - answer[0]).abs().max() <= 5e-4


def test_a_rank_holds_a_byte_for_each_element(done):
    """llama-biases: 3 layers, K and V of 2 heads of 8; of 61 tokens, one rank holds 31."""
    assert done["ring"][0]["size"] == 3 * 2 * 2 * 8 * 31
