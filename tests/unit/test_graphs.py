"""Decode steps that are recorded and replayed, on CPU with a recorder in the CUDA graph's place: the plain path's
tokens and logits."""

import gc
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from recorded import RecordedStep

from nemo_star import LLM
from nemo_star.attention.cache import KVShape
from nemo_star.attention.fixed import FixedStep, OwnKV
from nemo_star.config.model import ModelConfig, MoEConfig
from nemo_star.engine import graphs
from nemo_star.engine.graphs import StepGraphs, check_graphs
from nemo_star.kernels.math import MathKernel
from nemo_star.kernels.padded import attend_padded
from nemo_star.parallel.layout import Layout

CONTEXT = [(7 * i * i + 3 * i) % 251 for i in range(120)]
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def engine(tiny):
    """Without anything recorded."""
    return LLM(tiny, attention={"block_size": 32, "kernel": "cpu"}).engine


@pytest.fixture(scope="module")
def engine_in_fp8(tiny):
    return LLM(tiny, attention={"block_size": 32, "kernel": "cpu"}, cache={"dtype": "fp8_e4m3"}).engine


@pytest.fixture
def recording(engine, monkeypatch):
    """(the same engine, what it has recorded so far)."""
    return engine, recorded_of(engine, monkeypatch)


def recorded_of(engine, monkeypatch):
    made = []

    def make():
        made.append(RecordedStep())
        return made[-1]

    monkeypatch.setattr(engine, "graphs", StepGraphs(engine, make))
    return made


def answers(engine, context, queries, steps, sequences=None):
    """Greedy tokens [steps] of each, and logits [steps, queries, vocab], decoded together."""
    sequences = sequences or [engine.sequence(context, max_tokens=steps + 8) for _ in queries]
    tokens, logits = [], []
    run = [list(query) for query in queries]
    for _ in range(steps):
        after = engine.decode(zip(sequences, run, strict=True))
        chosen = after.argmax(-1).tolist()
        logits.append(after)
        tokens.append(chosen)
        run = [[token] for token in chosen]
    return tokens, torch.stack(logits)


def take(engine, sequence, tokens):
    """So many steps of one sequence; logits after the last."""
    return [engine.decode([(sequence, [3])]) for _ in range(tokens)][-1]


def plainly(engine, *arguments, **keywords):
    graphs, engine.graphs = engine.graphs, None
    try:
        return answers(engine, *arguments, **keywords)
    finally:
        engine.graphs = graphs


@pytest.mark.parametrize("queries", [[[3, 4, 5]], [[3, 4, 5], [9], [8, 1, 7, 2]]], ids=["one", "three"])
def test_replayed_steps_are_the_plain_path(recording, queries):
    engine, made = recording
    context = engine.encode(CONTEXT)
    expected_tokens, expected = plainly(engine, context, queries, 24)
    tokens, logits = answers(engine, context, queries, 24)
    assert tokens == expected_tokens
    assert (logits - expected).abs().max() <= TOLERANCE
    assert [step.replays for step in made] == [22]  # the query, and the first token, run as they are


def test_a_cache_in_fp8_is_read_as_on_the_plain_path(engine_in_fp8, monkeypatch):
    made = recorded_of(engine_in_fp8, monkeypatch)
    context = engine_in_fp8.encode(CONTEXT)
    expected_tokens, expected = plainly(engine_in_fp8, context, [[3, 4, 5], [9]], 12)
    tokens, logits = answers(engine_in_fp8, context, [[3, 4, 5], [9]], 12)
    assert tokens == expected_tokens
    assert (logits - expected).abs().max() <= TOLERANCE
    assert [step.replays for step in made] == [10]


def test_more_own_tokens_than_a_step_looks_at_are_recorded_anew(recording, monkeypatch):
    monkeypatch.setattr(graphs, "MIN_REACH", 8)
    monkeypatch.setattr(graphs, "MIN_ROOM", 20)
    engine, made = recording
    context = engine.encode(CONTEXT)
    fits = [engine.sequence(context, max_tokens=100)]
    grows = [engine.sequence(context)]
    expected_tokens, expected = plainly(engine, context, [[3, 4, 5]], 36)
    for sequences, recorded in ((fits, 4), (grows, 5)):
        made.clear()
        tokens, logits = answers(engine, context, [[3, 4, 5]], 36, sequences)
        assert tokens == expected_tokens
        assert (logits - expected).abs().max() <= TOLERANCE
        assert len(made) == recorded, [step.replays for step in made]


def test_sequences_come_go_and_go_on(recording):
    """A question more, one fewer, a turn of several tokens, a roll back, a fork: as without recordings."""

    def story(engine, context, other):
        one, two = (engine.sequence(of) for of in (context, other))
        three = engine.sequence(context)
        seen = [engine.decode([(one, [3, 4]), (two, [5]), (three, [6])])]
        for token in range(4):
            seen.append(engine.decode([(one, [token]), (two, [token + 1]), (three, [token + 2])]))  # contexts alternate
        for token in range(4):
            seen.append(engine.decode([(three, [token]), (one, [token + 9])]))
        seen.append(engine.decode([(one, [8, 8, 8])]))
        for token in range(3):
            seen.append(engine.decode([(one, [token])]))
        engine.truncate(one, 6)
        for token in range(3):
            seen.append(engine.decode([(one, [token + 5])]))
        forked = one.fork()
        for token in range(3):
            seen.append(engine.decode([(one, [token]), (forked, [token + 30])]))
        return seen, [sequence.cache.tokens for sequence in (one, two, three, forked)]

    engine, made = recording
    contexts = engine.encode(CONTEXT), engine.encode(CONTEXT[:70])
    recorder, engine.graphs = engine.graphs, None
    expected, cached = story(engine, *contexts)
    engine.graphs = recorder
    seen, cached_too = story(engine, *contexts)
    assert cached_too == cached
    for logits, right in zip(seen, expected, strict=True):
        assert (logits - right).abs().max() <= TOLERANCE
    assert len(made) == 4
    assert sum(step.replays for step in made) == 13


def test_a_turn_that_outgrows_the_buffers_moves_what_comes_after(recording, monkeypatch):
    """The cache then lies elsewhere, also after it was rolled back: tokens written to the old place would be lost."""

    def story(engine, context):
        sequence = engine.sequence(context)
        steps = [[3, 4], [5], [6], [7], list(range(20)), [8], [9], [10], [11, 12]]
        logits = []
        for number, tokens in enumerate(steps):
            if number == 5:
                engine.truncate(sequence, 5)
            logits.append(engine.decode([(sequence, tokens)]))
        return torch.cat(logits)

    monkeypatch.setattr(graphs, "MIN_ROOM", 4)
    engine, made = recording
    context = engine.encode(CONTEXT)
    recorder, engine.graphs = engine.graphs, None
    expected = story(engine, context)
    engine.graphs = recorder
    assert (story(engine, context) - expected).abs().max() <= TOLERANCE
    assert [step.replays for step in made] == [2, 2]


def test_the_logits_of_a_step_stay_what_they_are(recording):
    engine, _ = recording
    sequence = engine.sequence(engine.encode(CONTEXT))
    logits = take(engine, sequence, 3)
    before = logits.clone()
    engine.decode([(sequence, [4])])
    assert torch.equal(logits, before)


def test_a_context_is_freed_with_its_last_sequence(recording):
    engine, made = recording
    context = engine.encode(CONTEXT)
    sequence = engine.sequence(context)
    take(engine, sequence, 4)
    freed = [weakref.ref(context.cache), weakref.ref(made[0])]
    made.clear()
    del context, sequence
    gc.collect()
    assert [ref() for ref in freed] == [None, None]


def test_a_context_that_went_on_is_refused(recording):
    engine, _ = recording
    context = engine.encode(CONTEXT)
    sequence = engine.sequence(context)
    take(engine, sequence, 3)
    begun = engine.extend(context, CONTEXT)
    while begun.steps_left:
        begun.advance()
    with pytest.raises(ValueError, match="the context has gone on"):
        engine.decode([(sequence, [3])])


def test_only_so_many_recordings_are_kept(recording):
    engine, made = recording
    context = engine.encode(CONTEXT)
    sequences = [engine.sequence(context) for _ in range(graphs.MAX_GRAPHS + 2)]
    for _ in range(3):
        for sequence in sequences[: graphs.MAX_GRAPHS]:
            engine.decode([(sequence, [3])])
    assert [step.replays for step in made] == [2] * graphs.MAX_GRAPHS
    kept = [weakref.ref(step) for step in made]
    made.clear()
    for sequence in sequences[graphs.MAX_GRAPHS :]:
        engine.decode([(sequence, [3])])
    gc.collect()
    assert [ref() is None for ref in kept] == [True, True, False, False]


def test_every_step_is_told(recording):
    engine, _ = recording
    told = []
    engine.graphs.on_step = lambda: told.append(True)
    answers(engine, engine.encode(CONTEXT), [[3, 4]], 6)
    assert len(told) == 5


def test_what_fp8_has_no_value_for_becomes_its_largest():
    own = OwnKV.empty(1, 4, [1], KVShape(1, 1, 8, torch.float8_e5m2, torch.device("cpu")))
    slots, length = torch.tensor([0]), torch.tensor([1])
    step = FixedStep((), own, slots, length, 4)
    k = torch.full((1, 1, 1, 8), 1e6)
    out, _ = step.attend_own(1, torch.ones(1, 1, 2, 8), k, -k, 1e-6)
    assert torch.equal(own.buffers[1][0][0, 0].float(), torch.full((1, 8), 57344.0))
    assert torch.equal(out, torch.full((1, 1, 2, 8), -57344.0))


@pytest.mark.parametrize("lengths", [[0, 1, 37], [40, 40, 40]])
def test_padded_attention_is_attention_over_the_keys_there_are(lengths):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for shape in ((3, 6, 16), (3, 40, 2, 16), (3, 40, 2, 16)))
    out, lse = attend_padded(q, k, v, 0.3, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        own = (x[row, :length, None] for x in (k, v))
        expected_out, expected_lse = MathKernel().decode(q[None, row, None], *own, 0.3, False)
        torch.testing.assert_close(out[row], expected_out[0, 0])
        torch.testing.assert_close(lse[row], expected_lse[0, 0])


def test_a_sequence_s_slots_are_its_own(engine):
    shape = engine.stage.kv_shape
    own = OwnKV.empty(2, 5, [1], shape)
    k, _ = own.of(1)[1]
    assert k.shape == (5, 1, shape.groups, shape.channels)
    own.buffers[1][0].flatten(0, 1)[own.slot(1, 3)] = 1.0
    assert k[3].eq(1).all()
    own.buffers[1][0].flatten(0, 1)[own.slot(0, None)] = 2.0
    assert not k.eq(2).any()
    assert not own.of(0)[1][0].eq(2).any()


SHAPE = ModelConfig(2, 32, 4, 2, 64, 100)
EXPERTS = MoEConfig(num_experts=4, experts_per_token=2, ffn_hidden_size=48)


@pytest.mark.parametrize(
    ("changes", "layout", "device", "message"),
    [
        ({}, (1, 1, 1, 1), "cpu", "it needs GPUs, and this is cpu"),
        ({}, (1, 1, 1, 2), "cuda", "pipeline_model_parallel_size=2"),
        ({"window_size": 8, "windowed_layers": (0,)}, (1, 1, 1, 1), "cuda", "windowed layer"),
        ({"moe": EXPERTS}, (2, 2, 1, 1), "cuda", "moe.ffn_hidden_size=48 leaves a rank no multiple of 8"),
        ({"moe": EXPERTS, "hidden_size": 36}, (1, 1, 1, 1), "cuda", "hidden_size=36 leaves a rank"),
    ],
)
def test_what_cannot_be_recorded_is_refused(changes, layout, device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", None, raising=False)
    with pytest.raises(ValueError, match=f"decode.cuda_graph=true does not go here: .*{message}"):
        check_graphs(replace(SHAPE, **changes), Layout(*layout), torch.device(device), torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((9, 0), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)]
)
def test_experts_are_recorded_where_the_host_is_not_asked(capability, dtype, monkeypatch):
    device, model = torch.device("cuda"), replace(SHAPE, moe=EXPERTS)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    check_graphs(SHAPE, Layout(2, 2, 1, 1), device, dtype)
    with pytest.raises(ValueError, match="the host asks which experts a token takes"):
        check_graphs(model, Layout(2, 1, 1, 1), device, dtype)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", None, raising=False)  # a release before 2.10 has none
    check_graphs(model, Layout(2, 1, 1, 1), device, torch.bfloat16)
    check_graphs(model, Layout(2, 2, 1, 1, 4), device, torch.bfloat16)  # whole experts, on whatever ranks


def test_memory_is_shared_with_graphs_that_live(monkeypatch):
    """CUDA's allocator drops a pool with the last graph that has it, and does not take its handle again. torch collects
    garbage before it records."""
    pools, alive, garbage = [], weakref.WeakSet(), []

    class Graph:
        def pool(self):
            return self.shared

    @contextmanager
    def recording(graph, pool, capture_error_mode):
        garbage.clear()
        assert pool is None or any(known.shared is pool for known in alive)
        graph.shared = object() if pool is None else pool
        alive.add(graph)
        pools.append(graph.shared)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    make = graphs.cuda_step_graphs()
    first, second = make(), make()
    assert first.record(lambda: 1) == second.record(lambda: 1) == 1
    del first
    garbage.append(second)
    del second
    third = make()
    third.record(lambda: 2)
    del third
    make().record(lambda: 3)
    assert pools[0] is pools[1] is pools[2] is not pools[3]


def test_it_is_refused_before_weights_are_loaded(tiny):
    with pytest.raises(ValueError, match="cuda_graph=true does not go here: it needs GPUs"):
        LLM(tiny, decode={"cuda_graph": True})


def test_a_kernel_that_is_no_operation_of_torch_is_refused(engine, monkeypatch):
    from nemo_star.kernels.te import TEKernel

    monkeypatch.setattr(engine.state, "decode_kernel", TEKernel())
    with pytest.raises(ValueError, match="cannot record the decode of attention.kernel=te"):
        StepGraphs(engine, RecordedStep)
