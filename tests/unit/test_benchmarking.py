"""tools/benchmark.py in the test process: what fits, in which order things run, what is left when it dies."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from nemo_star.benchmarking import run as benchmark
from nemo_star.benchmarking.contenders import ALONE, OnEngine, build_contenders
from nemo_star.benchmarking.fit import shortage
from nemo_star.config.benchmark import BenchmarkConfig
from nemo_star.config.compare import Candidate
from nemo_star.config.model import ModelConfig
from nemo_star.config.strict import parse
from nemo_star.methods.config import AttentionConfig
from nemo_star.parallel.layout import Layout
from nemo_star.planning.memory import weight_elements
from nemo_star.runtime.memory import FreeMemory
from nemo_star.runtime.watchdog import Watchdog

LLAMA = ModelConfig(32, 4096, 32, 8, 14336, 128256)
SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 64,
    "vocab_size": 100,
}


def contender(word, layout, block_size=32768, **values):
    candidate = Candidate.parse(word)
    method = candidate.method(AttentionConfig(block_size=block_size), LLAMA)
    return OnEngine(candidate, method, layout, torch.bfloat16, frozenset(), None, **values)


def test_a_million_tokens_do_not_fit_on_one_gpu():
    """Llama 3.1 8B: K and V of 2**20 tokens in 32 layers of 8 heads of 128 in bfloat16 are 128 GiB."""
    room = 139 * 2**30 - 2 * weight_elements(LLAMA, ALONE, 0)
    star = contender("star:shared", ALONE)
    said = shortage(star, LLAMA, 2**20, [FreeMemory("GPU 0", room)])
    assert said.startswith("does not fit into GPU 0: 128.00 GiB of K/V and about ")
    assert shortage(star, LLAMA, 2**19, [FreeMemory("GPU 0", room)]) is None
    narrow = contender("star:shared", ALONE, cache_dtype=torch.float8_e4m3fn)
    assert shortage(narrow, LLAMA, 2**20, [FreeMemory("GPU 0", room)]) is None
    assert ": 128.00 GiB of K/V" in shortage(narrow, LLAMA, 2**21, [FreeMemory("GPU 0", room)])
    # Two ranks hold half each: on a GPU each it fits, in one memory of that size it does not.
    shared = contender("star:shared", Layout(tp=1, cp=2, dp=1, pp=1))
    assert shortage(shared, LLAMA, 2**20, [FreeMemory(f"GPU {rank}", room) for rank in range(2)]) is None
    assert "128.00 GiB of K/V" in shortage(shared, LLAMA, 2**20, [FreeMemory("host", room)] * 2)
    short = [FreeMemory("GPU 0", room), FreeMemory("GPU 1", 2**36)]
    assert "into GPU 1: 64.00 GiB of K/V" in shortage(shared, LLAMA, 2**20, short)


def test_words_say_how_decode_steps_run():
    (word,) = parse(
        BenchmarkConfig, {"compare": ["star+linears:torch+decode:sharded+steps:graph"], "model": SHAPE}
    ).candidates
    assert (word.kind, word.variant, word.decode, word.cuda_graph, word.torch_linears) == (
        "star",
        None,
        "sharded",
        True,
        True,
    )
    (word,) = parse(BenchmarkConfig, {"compare": ["dense+steps:graph"], "model": SHAPE}).candidates
    assert (word.decode, word.cuda_graph, word.torch_linears) == (None, True, False)
    for wrong in ("star+steps:eager", "star+steps", "star+steps:graph+steps:graph", "dense+decode:sharded+steps:graph"):
        with pytest.raises(ValueError, match="unknown; known: .*; on GPUs \\+steps:graph; on GPUs \\+linears:torch"):
            parse(BenchmarkConfig, {"compare": [wrong], "model": SHAPE})
    with pytest.raises(ValueError, match="'star\\+steps:graph' is unknown"):  # a plan knows no such time
        Candidate.parse("star+steps:graph")


@pytest.mark.parametrize("option", ["steps:graph", "linears:torch"])
def test_steps_that_need_gpus_are_refused_before_anything_runs(groups, option):
    config = parse(BenchmarkConfig, {"compare": [f"star+{option}"], "model": SHAPE})
    with pytest.raises(ValueError, match=r"decode\.(cuda_graph|torch_linears)=true .* cpu"):
        build_contenders(config, config.model, (ALONE, groups), groups)


def test_what_runs_alone_takes_the_first_rank_s_memory():
    free = [FreeMemory("GPU 0", 2**40), FreeMemory("GPU 1", 1)]
    assert shortage(contender("dense", ALONE), LLAMA, 2**17, free) is None


@pytest.fixture
def config(tmp_path):
    settings = {"context_tokens": [40, 4000, 48], "repeats": 1, "decode_tokens": 1, "warm_up_rounds": 0}
    output = str(tmp_path / "rows.json")
    return parse(BenchmarkConfig, {"compare": ["dense"], "model": SHAPE, "output": output, **settings})


def test_what_does_not_fit_is_withheld_and_the_rest_goes_on(config, groups, capsys):
    assert benchmark.run(config, lambda device: FreeMemory("here", 200_000)) == 0
    rows = json.loads(Path(config.output).read_text())
    assert [(row["context_tokens"], row["withheld"] is None) for row in rows] == [(40, True), (4000, False), (48, True)]
    assert rows[1]["withheld"].startswith("does not fit into here")
    assert "prefill_seconds" not in rows[1]
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == ["context", "40", "4000", "48"]
    assert "withheld: does not fit into here" in printed


def test_k_and_v_are_of_the_type_that_is_set(tmp_path, groups):
    sizes = []
    for dtype in (None, "fp8_e4m3"):
        settings = {"context_tokens": [40], "repeats": 1, "decode_tokens": 1, "output": str(tmp_path / f"{dtype}.json")}
        values = {"compare": ["dense"], "model": SHAPE, "cache": {"dtype": dtype}, **settings}
        assert benchmark.run(parse(BenchmarkConfig, values)) == 0
        (row,) = json.loads(Path(settings["output"]).read_text())
        assert row["cache_dtype"] == (dtype or "float32")
        assert row["kv_read_seconds"] > 0
        sizes.append(row["kv_bytes_per_rank"])
    assert sizes[0] == 4 * sizes[1] == 4 * 40 * 2 * 2 * 2 * 8


def test_rows_of_earlier_lengths_outlive_a_failure(config, groups, monkeypatch):
    measure = benchmark._measure

    def fails_at_the_second(contenders, tokens, *rest):
        if tokens == 4000:
            raise RuntimeError("out of memory")
        return measure(contenders, tokens, *rest)

    monkeypatch.setattr(benchmark, "_measure", fails_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        benchmark.run(config)
    (row,) = json.loads(Path(config.output).read_text())
    assert row["context_tokens"] == 40
    assert row["prefill_seconds"] > 0


class Noted:
    """Stands for a candidate: notes what it is asked for, and takes longer the first time it meets a length."""

    def __init__(self, word, said):
        self.candidate, self.said = Candidate.parse(word), said
        self.method = self.candidate.method(AttentionConfig(), LLAMA)

    def sample(self, context, decode_tokens):
        met = any(entry == (self.candidate.word, len(context)) for entry in self.said)
        self.said.append((self.candidate.word, len(context)))
        return {"prefill_seconds": 1.0 if met else 5.0, "kv_bytes_per_rank": 1}


def test_rounds_go_there_and_back_and_warm_up_at_another_length(config, groups):
    said = []
    contenders = [Noted(word, said) for word in ("dense", "ring")]
    rounds = dataclasses.replace(config, warm_up_rounds=1, repeats=3)
    watchdog = Watchdog(None, 1)
    samples = benchmark._measure(contenders, 40, rounds, watchdog)
    a, b = "dense", "ring"
    assert said == [(a, 41), (b, 41), (b, 40), (a, 40), (a, 40), (b, 40), (b, 40), (a, 40)]
    row = benchmark._medians(samples[0])
    assert row == {
        "prefill_seconds": 1.0,
        "kv_bytes_per_rank": 1,
        "first_round": {"prefill_seconds": 5.0},
        "repeats": 3,
    }


def test_all_start_up_before_the_first_is_measured(config, groups):
    said = []
    star = Noted("star:shared", said)
    star.method = star.method.resized(16)
    large = Noted("star:recompute", said)
    large.method = large.candidate.method(AttentionConfig(anchor_size=64), LLAMA)  # larger than a short context's block
    benchmark._start_up([star, large, Noted("dense", said)], config, Watchdog(None, 1))
    assert said == [("star:shared", 20), ("dense", 20)]
