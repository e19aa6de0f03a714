"""The planner: identities, what it counts against what runs, and published tables."""

import dataclasses
import itertools
import json

import pytest
from launch import ROOT, run_tool

from nemo_star.config.compose import CONF, RECIPES, compose, compose_group
from nemo_star.config.model import MLP_CHUNK_TOKENS, ModelConfig, MoEConfig
from nemo_star.config.plan import EfficiencyConfig, MachineConfig, PlanConfig
from nemo_star.methods import star
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.registry import method_of
from nemo_star.parallel.layout import Layout
from nemo_star.planning import report
from nemo_star.planning.measured import compare_rows
from nemo_star.planning.memory import activation_bytes, fullest_rank, kv_bytes, kv_bytes_read, weight_elements
from nemo_star.planning.plan import block_rows, fastest, plan_rows
from nemo_star.planning.published import median_error, published_cells
from nemo_star.planning.time import Clock, decode_seconds, layer_time, prefill_seconds
from nemo_star.planning.work import Workload, rank_work, work_of

LLAMA = ModelConfig(32, 4096, 32, 8, 14336, 128256)
EXPERTS = MoEConfig(num_experts=64, experts_per_token=8, ffn_hidden_size=256)
MACHINES = sorted(path.stem for path in (CONF / "machine").glob("*.yaml"))


def test_grouped_experts_hold_a_row_for_each_expert_of_a_token():
    """models/moe.py: gathered, their results, and these sorted back; more than attention here has."""
    model = dataclasses.replace(LLAMA, num_query_groups=1, num_attention_heads=2, kv_channels=64, moe=EXPERTS)
    method = method_of(AttentionConfig(kind="dense"))
    on_gpu, on_cpu = (
        Workload(model, Layout(1, 1, 1, 1), method, 8192, device_type=device) for device in ("cuda", "cpu")
    )
    rows = MLP_CHUNK_TOKENS * EXPERTS.experts_per_token * model.hidden_size * on_gpu.dtype_bytes
    held = [activation_bytes(work, rank_work(work)[0]) for work in (on_gpu, on_cpu)]
    assert held[0] - held[1] == 3 * rows


@pytest.fixture(scope="module")
def a800():
    return Clock(compose_group(MachineConfig, "machine", "a800"), EfficiencyConfig())


def llama(kind, tokens, *, tp=1, pp=1, cp=1, dtype="bfloat16", decode="replicated", **attention):
    name, _, anchor = kind.partition(":")
    attention = AttentionConfig(kind=name, anchor=anchor or "shared", **attention)
    layout = Layout(tp=tp, cp=cp, dp=1, pp=pp)
    return Workload(LLAMA, layout, method_of(attention), tokens, dtype=dtype, decode=decode)


def plan(*arguments):
    return compose(PlanConfig, arguments, tool="plan", literal_keys=("output", "check"))


# What there is to do


@pytest.mark.parametrize(
    ("kind", "windows"),
    [*itertools.product(("star:shared", "star:recompute", "ring", "ulysses"), (False, True)), ("summary", False)],
)
@pytest.mark.parametrize(
    ("tokens", "block", "cp"), [(97, 10, 4), (97, 32, 4), (96, 12, 8), (100, 100, 3), (5, 2, 4), (33, 8, 1)]
)
@pytest.mark.parametrize(("anchor", "overlap"), [(0.5, 0), (0.5, 0.75), (1, 1)])
def test_the_ranks_that_differ_stand_for_all(kind, tokens, block, cp, windows, anchor, overlap):
    sizes = {"block_size": block, "anchor_size": int(anchor * block), "sink_size": 1, "chunk_size": 1}
    sizes["overlap_size"] = int(overlap * block)
    planned = llama(kind, tokens, cp=cp, **sizes)
    if windows:
        planned = dataclasses.replace(planned, method=planned.method.with_windows())
    method = planned.method
    partition = method.partition(tokens, cp)
    every_block = [(block, 1) for blocks in partition.ranks for block in blocks]
    assert planned.tokens_by_rank == partition.tokens_by_rank
    assert planned.num_blocks == partition.num_blocks == len(every_block)
    assert load(method, method.all_blocks(tokens, cp)) == load(method, every_block)
    assert max(rank.tokens for rank in rank_work(planned)) == max(partition.tokens_by_rank)

    every = [load(method, [(block, 1) for block in blocks]) for blocks in partition.ranks]
    assert every == [load(method, work_of(planned, rank).blocks) for rank in range(cp)]
    standing = [load(method, rank.blocks) for rank in rank_work(planned)]
    for measure in (0, 1):
        assert max(load[measure] for load in standing) == max(load[measure] for load in every)


def load(method, counted):
    """(tokens in flight, pairs) of counted blocks."""
    pairs = sum(count * method.pairs(block) for block, count in counted)
    return sum(count * method.tokens_in_flight(block) for block, count in counted), pairs


def test_a_hundred_million_tokens_on_4096_ranks_cost_no_more_than_a_thousand(monkeypatch):
    made = []
    original = star.Block
    monkeypatch.setattr(star, "Block", lambda *arguments: made.append(1) or original(*arguments))
    counts = []
    for tokens, world in ((1000, 4), (100_000_000, 4096)):
        made.clear()
        arguments = f"context_tokens={tokens}", f"world_size={world}", "attention.block_size=128"
        rows = plan_rows(plan(*arguments, "compare=[star:shared,star:recompute]"))
        assert all(row["prefill_seconds"] > 0 for row in rows)
        counts.append(len(made))
    assert counts[1] < 2 * counts[0] < 200


# Time


def test_one_block_is_dense_attention(a800):
    star, dense = llama("star:shared", 5000, block_size=5000), llama("dense", 5000)
    assert star.flops == dense.flops
    assert prefill_seconds(star, a800) == prefill_seconds(dense, a800)
    assert decode_seconds(star, a800) == decode_seconds(dense, a800)
    assert fullest_rank(star) == fullest_rank(dense)


def test_a_shared_anchor_halves_the_matrices_and_saves_a_quarter_of_the_attention(a800):
    times = {}
    for anchor in ("shared", "recompute"):
        planned = llama(f"star:{anchor}", 2**17, cp=8, block_size=2**14)
        rank = rank_work(planned)[1]
        times[anchor] = layer_time(planned, a800, rank, rank.blocks[0][0])
    shared, recompute = times["shared"], times["recompute"]
    for part in ("qkv", "projection", "ffn", "other"):
        assert getattr(shared, part) * 2 == pytest.approx(getattr(recompute, part))
    assert shared.attention == pytest.approx(0.75 * recompute.attention, rel=1e-4)
    assert shared.exposed == recompute.exposed == 0  # the broadcast is hidden behind the layer


def test_communication_that_nothing_hides_takes_time(a800):
    alone = dataclasses.replace(a800.machine, overlaps=False)
    for kind in ("star:shared", "ring"):
        planned = llama(kind, 2**17, cp=8, block_size=2**14)
        assert prefill_seconds(planned, Clock(alone, a800.efficiency)) > prefill_seconds(planned, a800)


def test_stages_wait_for_their_first_block(a800):
    def seconds(pp, block):
        return prefill_seconds(llama("star:shared", 2**16, pp=pp, block_size=block, anchor_size=0), a800)

    one_block = seconds(4, 2**16)
    assert one_block == pytest.approx(seconds(1, 2**16), rel=0.01)  # stages run in turn
    assert seconds(4, 2**12) < 0.4 * seconds(1, 2**12)  # 16 blocks fill the pipeline


def test_sharded_decode_reads_slices_of_the_ffn(a800):
    replicated, sharded = (llama("star:shared", 2**14, cp=8, decode=decode) for decode in ("replicated", "sharded"))
    assert decode_seconds(sharded, a800) < 0.6 * decode_seconds(replicated, a800)
    read = 32 * (4096 * 6144 + 4096 * 4096) + (32 * 3 * 4096 * 14336 + 128256 * 4096) / 8
    assert decode_seconds(sharded, a800) > 2 * read / a800.machine.memory_bandwidth


def test_few_tokens_still_read_the_weights(a800):
    planned = llama("dense", 1)
    weights = 2 * 32 * sum(elements for elements in (4096 * 6144, 4096 * 4096, 3 * 4096 * 14336))
    assert prefill_seconds(planned, a800) > weights / a800.machine.memory_bandwidth


# Memory


def test_weights_are_those_of_the_model():
    model = LLAMA
    assert weight_elements(model, Layout(1, 1, 1, 1), 0) == 8_030_261_248  # Llama-3.1-8B's own count
    stages = [weight_elements(model, Layout(1, 1, 1, 3), stage) for stage in range(3)]
    assert sum(stages) == 8_030_261_248
    tied = dataclasses.replace(model, share_embeddings_and_output_weights=True)
    assert weight_elements(model, Layout(1, 1, 1, 1), 0) - weight_elements(tied, Layout(1, 1, 1, 1), 0) == 128256 * 4096
    padded = dataclasses.replace(model, vocab_size=128255)
    assert weight_elements(padded, Layout(2, 1, 1, 1), 0) == weight_elements(model, Layout(2, 1, 1, 1), 0)


def test_memory_falls_with_ranks_and_types():
    peaks = [fullest_rank(llama("star:shared", 2**20, cp=cp, block_size=2**14)).peak for cp in (1, 2, 4, 8, 16, 64)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[-1]
    for kind in ("ring", "ulysses"):
        kv = [fullest_rank(llama(kind, 2**17, cp=cp)).kv for cp in (1, 2, 4, 8)]
        assert [kv[0] // cp for cp in (1, 2, 4, 8)] == kv
    tp = fullest_rank(llama("dense", 2**15, tp=4)).peak
    assert tp < fullest_rank(llama("dense", 2**15)).peak / 3
    assert fullest_rank(llama("dense", 2**15, dtype="float32")).peak == 2 * fullest_rank(llama("dense", 2**15)).peak


def test_kv_bytes_are_those_of_the_cache(tiny):
    from nemo_star import LLM

    llm = LLM(tiny, attention={"block_size": 16})
    cache = llm.encode(list(range(50))).cache
    model = llm.description.model
    planned = Workload(model, Layout(1, 1, 1, 1), llm.method, 50, dtype="float32")
    assert kv_bytes(planned, 0, 50) == cache.nbytes
    assert weight_elements(model, Layout(1, 1, 1, 1), 0) == sum(p.numel() for p in llm.engine.stage.model.parameters())


@pytest.mark.parametrize(("tokens", "block", "cp"), [(50, 16, 1), (50, 4, 3), (5, 16, 2)])
def test_windowed_layers_hold_what_a_query_sees(tokens, block, cp):
    windowed = dataclasses.replace(LLAMA, window_size=9, windowed_layers=tuple(range(0, LLAMA.num_layers, 2)))
    every, layout = llama("star:shared", tokens, cp=cp, block_size=block), Layout(1, cp, 1, 1)
    planned = Workload(windowed, layout, method_of(AttentionConfig(block_size=block), windows=True), tokens)
    half, held = kv_bytes(every, 0, tokens) // 2, kv_bytes(planned, 0, tokens)
    assert held == half + half * min(tokens, 8) // tokens
    wider = method_of(AttentionConfig(block_size=block, overlap_size=2), windows=True)
    planned = dataclasses.replace(planned, method=wider)
    assert kv_bytes(planned, 0, tokens) == half + half * min(tokens, 10) // tokens
    assert kv_bytes_read(planned, 0, tokens) == held


# Published tables


def test_the_published_tables_are_met():
    cells = published_cells(EfficiencyConfig())
    assert len(cells) == 24
    assert median_error(cells) < 0.2
    prefill = [cell for cell in cells if cell.source.startswith("APB") and cell.source.endswith("prefill")]
    assert len(prefill) == 15
    assert median_error(prefill) < 0.2
    assert max(abs(cell.error) for cell in prefill) < 0.2


def test_the_documented_table_is_the_tool_s():
    documented = (ROOT / "BENCHMARKS.md").read_text()
    assert report.cells_table(published_cells(EfficiencyConfig())) in documented


def test_defaults_of_the_recipe_and_of_the_code_agree():
    assert plan().efficiency == EfficiencyConfig()


# Rows of tools/benchmark.py


def test_rows_of_the_benchmark_are_compared(tmp_path):
    attention = ["attention.block_size=1024", "attention.anchor_size=512", "attention.overlap_size=64"]
    config = plan("model=small", "machine=cpu", "context_tokens=4096", "world_size=2", *attention)
    rows = [{**row, "prefill_seconds": 2 * row["prefill_seconds"]} for row in plan_rows(config)]
    rows.append({**rows[0], "kind": "transformers", "attention": None})
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    compared = compare_rows(dataclasses.replace(config, check=str(file)))
    assert [row["kind"] for row in compared] == ["star:shared", "star:recompute", "ring", "ulysses", "dense"]
    for row in compared:
        assert row["prefill_seconds"]["measured"] == 2 * row["prefill_seconds"]["planned"]
        assert row["kv_bytes_per_rank"]["measured"] == row["kv_bytes_per_rank"]["planned"]
    assert "prefill s 50%" in report.measured_table(compared)
    with pytest.raises(ValueError, match="row 1 counts .* give the model="):
        compare_rows(dataclasses.replace(config, check=str(file), model=LLAMA))
    file.write_text('[{"attention": "ring"}]')
    with pytest.raises(ValueError, match="row 1 lacks context_tokens"):
        compare_rows(dataclasses.replace(config, check=str(file)))


# The tool


def test_every_machine_and_model_plans():
    models = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
    for machine, model in [*((name, "llama3_1_8b") for name in MACHINES), *(("h200", name) for name in models)]:
        rows = plan_rows(plan(f"machine={machine}", f"model={model}"))
        assert [row["kind"] for row in rows if row["error"] is not None] in ([], ["ulysses"])
        planned = [row for row in rows if row["error"] is None or "28 query heads" not in row["error"]]
        assert all(row["prefill_seconds"] > 0 and row["decode_seconds_per_token"] > 0 for row in planned)
    assert (RECIPES / "plan.yaml").exists()


def test_dense_takes_a_cpu_s_cores_and_one_gpu():
    cpu = {row["kind"]: row for row in plan_rows(plan("machine=cpu", "world_size=1"))}
    gpu = {row["kind"]: row for row in plan_rows(plan("world_size=1"))}
    assert cpu["dense"]["prefill_seconds"] == pytest.approx(cpu["ring"]["prefill_seconds"] / 2)
    assert gpu["dense"]["prefill_seconds"] == gpu["ring"]["prefill_seconds"]


def test_the_fastest_fits_and_a_kind_that_cannot_run_says_why():
    rows = plan_rows(plan("machine=a800", "context_tokens=1000000", "world_size=16"))
    reasons = {row["kind"]: row["error"] for row in rows}
    assert reasons["ulysses"] is None
    assert not next(row for row in rows if row["kind"] == "dense")["fits"]
    assert fastest(rows)["kind"] == "star:shared"
    rows = plan_rows(plan("world_size=12", "compare=[ulysses,ring]"))
    assert "32 query heads per tensor-parallel rank are not divisible by context_parallel_size 12" in rows[0]["error"]
    assert fastest(rows)["kind"] == "ring"


@pytest.mark.parametrize(
    ("arguments", "advised"),
    [
        (["context_tokens=131072"], 16384),  # a block for each of 8 ranks
        (["context_tokens=131072", "world_size=2"], 32768),  # a quarter
        (["context_tokens=1000000"], 32768),
        (["context_tokens=131072", "world_size=256"], 4096),  # not smaller than what was measured
        (["context_tokens=4000"], 1000),
        (["context_tokens=1000000", "machine.memory_bytes=40e9"], 8192),  # halved until activations fit
        (["context_tokens=1000000", "machine.memory_bytes=16e9"], None),  # weights and K/V do not
    ],
)
def test_the_advised_block(arguments, advised):
    rows = [row for row in block_rows(plan(*arguments)) if row["advised"]]
    assert [row["block_size"] for row in rows] == ([advised] if advised else [])
    assert all(row["fits"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["world_size=12", "parallel.tensor_model_parallel_size=8"], "world size 12 is not divisible by"),
        (["parallel.context_parallel_size=4"], "a plan is for one replica: world_size=8 leaves 2"),
        (["parallel.pipeline_model_parallel_size=64", "world_size=64"], "32 layers do not fill"),
        (
            ["model.num_attention_heads=31"],
            "hidden_size 4096 is not divisible by num_attention_heads 31: give kv_channels",
        ),
        (["compare=[star:twice]"], "'star:twice' is unknown; known: ring, star:shared"),
        (["context_tokens=0"], "context_tokens=0 must be at least 1"),
        (["machine.memory_bandwidth=0"], "machine.memory_bandwidth=0.0 must be above 0"),
        (["efficiency.gemm=1.5"], "efficiency.gemm=1.5 must be above 0 and at most 1"),
        (["+machine.nonsense=1"], "unknown key machine.nonsense"),
        (["+nonsense=1"], "unknown key nonsense"),
        (["validate=true", "check=rows.json"], "ask for one of them"),
    ],
)
def test_what_is_wrong_with_a_plan_is_named(arguments, message):
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        plan_rows(plan(*arguments))
    assert message in str(error.value)


def test_the_tool_prints_writes_and_leaves_nothing_else(tmp_path):
    out = tmp_path / "plan.json"
    done = run_tool(ROOT / "tools" / "plan.py", f"output={out}", "machine=b200", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 ranks of b200" in done.stdout
    assert "attention.block_size=16384: 1/8 of the context" in done.stdout
    written = json.loads(out.read_text())
    assert [row["kind"] for row in written["rows"]] == list(plan().compare)
    assert sum(row["advised"] for row in written["blocks"]) == 1
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(ValueError, match="exists: give another file or overwrite=true"):
        report.run(plan(f"output={out}"))


def test_an_unknown_machine_lists_the_known_ones(tmp_path):
    done = run_tool(ROOT / "tools" / "plan.py", "machine=abacus", cwd=tmp_path)
    assert done.returncode != 0
    assert all(machine in done.stderr for machine in MACHINES)
