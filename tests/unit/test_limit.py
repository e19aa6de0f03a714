"""tools/generate.py refuses a context that certainly does not fit, before it loads weights."""

import dataclasses

import pytest
from launch import read_jsonl, write_jsonl

from nemo_star.config.generate import GenerateConfig, InferenceConfig
from nemo_star.config.model import ModelConfig
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.registry import method_of
from nemo_star.parallel.layout import Layout
from nemo_star.planning.limit import MemoryLimit
from nemo_star.planning.memory import weight_elements
from nemo_star.planning.work import Workload
from nemo_star.runtime.memory import FreeMemory, free_memory

LLAMA = ModelConfig(32, 4096, 32, 8, 14336, 128256)
WEIGHTS = 2 * weight_elements(LLAMA, Layout(1, 1, 1, 1), 0)


def test_a_cpu_s_memory_is_that_of_its_machine():
    import psutil
    import torch

    free = free_memory(torch.device("cpu"))
    assert 0 < free.size <= psutil.virtual_memory().total + psutil.swap_memory().total
    assert free.pool == free_memory(torch.device("cpu")).pool


def limit(free, *, dp=1, cp=2, kind="star", cache_dtype=None):
    layout = Layout(tp=1, cp=cp, dp=dp, pp=1)
    return MemoryLimit(Workload(LLAMA, layout, method_of(AttentionConfig(kind=kind)), 0, cache_dtype=cache_dtype), free)


def test_ranks_of_one_machine_share_its_memory():
    context = 2**17
    kv = 2**34  # 128K tokens, 32 layers, 2 * 8 * 128 elements, 2 bytes
    shared = [FreeMemory("host", 2 * WEIGHTS + kv)] * 2
    limit(shared).check(context)
    with pytest.raises(
        ValueError, match=r"host: 2 ranks .* 29.92 GiB for weights .* 131080 tokens, 45.92 GiB are free"
    ):
        limit(shared).check(context + 8)
    apart = [FreeMemory("gpu 0", WEIGHTS + kv // 2), FreeMemory("gpu 1", WEIGHTS + kv // 2)]
    limit(apart).check(context)
    uneven = [FreeMemory("gpu 0", WEIGHTS + kv // 2), FreeMemory("gpu 1", WEIGHTS)]
    with pytest.raises(ValueError, match="does not fit into gpu 1: 1 rank there"):
        limit(uneven).check(context)
    limit(uneven).check(0)
    with pytest.raises(ValueError, match="weights"):
        limit([FreeMemory("host", 2 * WEIGHTS - 1)] * 2).check(0)


def test_in_fp8_twice_as_many_tokens_fit():
    shared = [FreeMemory("host", 2 * WEIGHTS + 2**34)] * 2
    with pytest.raises(ValueError, match="does not fit .*a smaller dtype, cache.dtype=fp8_e4m3, a shorter context"):
        limit(shared).check(2**18)
    limit(shared, cache_dtype="fp8_e4m3").check(2**18)
    with pytest.raises(ValueError, match="16.00 GiB for the K/V .*a smaller dtype, a shorter context"):
        limit(shared, cache_dtype="fp8_e5m2").check(2**18 + 8)
    with pytest.raises(ValueError, match="a smaller dtype, cache.dtype=bfloat16, a shorter context"):
        limit(shared, cache_dtype="float32").check(2**17)


def test_a_replica_with_room_is_enough():
    small, large = FreeMemory("gpu 0", WEIGHTS + 100), FreeMemory("gpu 1", 10 * WEIGHTS)
    limit([small, large], dp=2, cp=1).check(2**17)
    with pytest.raises(ValueError, match="gpu 0"):
        limit([small, dataclasses.replace(small, pool="gpu 1")], dp=2, cp=1).check(2**17)


def test_idle_ranks_are_pointed_out():
    free = [FreeMemory(f"gpu {rank}", 2**34) for rank in range(8)]
    with pytest.raises(ValueError, match="so that every rank has a block"):
        limit(free, cp=8).check(2**17)  # 4 blocks
    with pytest.raises(ValueError, match="a shorter context"):
        limit(free, cp=8, kind="ring").check(2**20)


@pytest.fixture
def question(tiny, tmp_path):
    rows = [
        {"id": name, "context_ids": [1] * tokens, "query_ids": [2]}
        for name, tokens in (("a", 20), ("b", 4000), ("c", 30))
    ]
    return GenerateConfig(
        checkpoint=str(tiny),
        input=str(write_jsonl(tmp_path / "in.jsonl", rows)),
        output=str(tmp_path / "out.jsonl"),
        attention=AttentionConfig(block_size=16),
        inference=InferenceConfig(tokens_to_generate=2),
    )


def test_a_line_that_does_not_fit_becomes_an_error_and_the_others_go_on(question, tiny, groups, tmp_path):
    from nemo_star.checkpoint.description import read_description
    from nemo_star.offline.generate import run

    model = read_description(tiny).model
    weights = 4 * weight_elements(model, Layout(1, 1, 1, 1), 0)
    room = 4 * 100 * 2 * model.num_layers * model.num_query_groups * model.kv_channels
    code = run(question, free_memory=lambda device: FreeMemory("here", weights + room))
    lines = read_jsonl(tmp_path / "out.jsonl")
    assert code == 3
    assert [sorted(set(line) & {"error", "token_ids"}) for line in lines] == [["token_ids"], ["error"], ["token_ids"]]
    assert "a context of 4000 tokens" in lines[1]["error"]
    assert "GiB are free; what helps: " in lines[1]["error"]


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(question, groups, tmp_path):
    from nemo_star.offline.generate import run

    with pytest.raises(ValueError, match="does not fit into here: 1 rank there needs"):
        run(question, free_memory=lambda device: FreeMemory("here", 1000))
    assert not (tmp_path / "out.jsonl").exists()
