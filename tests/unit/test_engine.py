"""Contexts and sequences as objects: what is alive, what is shared, what is changed."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from nemo_star import LLM
from nemo_star.engine import encoding
from nemo_star.engine.build import engine_around
from nemo_star.engine.engine import finished
from nemo_star.kernels.math import MathKernel
from nemo_star.kernels.te import TEKernel
from nemo_star.kernels.torch_flash import FlashKernel

CONTEXT = [(7 * i * i + 3 * i) % 251 for i in range(120)]


@pytest.fixture(scope="module")
def engine(tiny):
    return LLM(tiny, attention={"block_size": 32}).engine


def kv(cache, engine):
    return [x.clone() for number in engine.stage.layer_numbers for x in cache.get(number)]


def test_kernels_that_do_not_take_the_model_are_replaced_once_and_named(tiny, capsys):
    """On CPU torch's kernel for CUDA takes no heads at all."""
    engine = LLM(tiny).engine
    engine.state.kernel = engine.state.decode_kernel = FlashKernel()
    rotary, vocab_size = engine.stage.rotary, engine.stage.vocab_size
    again = engine_around(engine.stage.model, engine.state, engine.groups, rotary=rotary, vocab_size=vocab_size)
    assert type(again.state.kernel) is type(again.state.decode_kernel) is MathKernel
    assert capsys.readouterr().err.count("attention.kernel=flash does not take this model") == 1
    assert again.describe() == "kernel math, float32"


def test_what_is_for_transformer_engine_s_layers_is_refused_where_there_are_none(tiny):
    with pytest.raises(ValueError, match="torch_linears=true is for Transformer Engine's layers; on cpu in float32"):
        LLM(tiny, decode={"torch_linears": True})


def test_the_kernels_of_prefill_and_decode_are_both_named(engine, monkeypatch):
    monkeypatch.setattr(engine.state, "kernel", TEKernel())
    monkeypatch.setattr(engine.state, "decode_kernel", FlashKernel())
    assert engine.describe() == "kernel prefill te, decode flash, float32"


def test_a_context_is_freed_with_its_last_reference(engine):
    """Also after a step: a second context is encoded without the first one's memory."""
    context = engine.encode(CONTEXT)
    engine.decode([(engine.sequence(context), [1, 2, 3])])
    cache = weakref.ref(context.cache)
    del context
    gc.collect()
    assert cache() is None


@pytest.mark.parametrize("parts", [([7], [9]), ([7, 8], [9, 2])])
def test_a_sequence_twice_in_a_step_sees_what_came_before_only(engine, parts):
    context = engine.encode(CONTEXT)
    once, twice = engine.sequence(context), engine.sequence(context)
    for sequence in (once, twice):
        engine.decode([(sequence, [3, 4, 5])])
    expected = torch.cat([engine.decode([(once, part)]) for part in parts])
    torch.testing.assert_close(engine.decode([(twice, part) for part in parts]), expected, atol=5e-4, rtol=0)


def test_decoding_changes_nothing_in_the_context(engine):
    context = engine.encode(CONTEXT)
    before = kv(context.cache, engine)
    sequence = engine.sequence(context)
    for tokens in ([1, 2, 3], [4], [5]):
        engine.decode([(sequence, tokens)])
    assert all(torch.equal(*pair) for pair in zip(before, kv(context.cache, engine), strict=True))
    assert context.cache.tokens == context.tokens == 120
    assert sequence.cache.tokens == 5
    assert sequence.position == 125


def test_sequences_of_several_contexts_run_in_one_step(engine):
    contexts = [engine.encode(CONTEXT), engine.encode(CONTEXT[::-1][:70])]
    prompts = [[3, 4, 5], [9]]
    sequences = [engine.sequence(context) for context in contexts]
    together = engine.decode(zip(sequences, prompts, strict=True))
    assert together.shape == (2, 256)
    for row, (context, prompt) in enumerate(zip(contexts, prompts, strict=True)):
        alone = engine.decode([(engine.sequence(context), prompt)])
        assert (together[row] - alone[0]).abs().max() <= 5e-4


def test_a_query_in_one_step_or_token_by_token_is_the_same(engine):
    context = engine.encode(CONTEXT)
    whole = engine.decode([(engine.sequence(context), [3, 4, 5])])
    sequence = engine.sequence(context)
    for token in (3, 4, 5):
        logits = engine.decode([(sequence, [token])])
    assert (whole - logits).abs().max() <= 5e-4


def test_two_questions_on_one_context_are_those_on_two(engine):
    def answer(context, query):
        choose = lambda logits: (int(logits.argmax()), False)  # noqa: E731
        return [step.token for step in engine.generate(context, query, max_tokens=6, choose=choose)]

    shared = engine.encode(CONTEXT)
    for query in ([3, 4, 5], [8, 1], [3, 4, 5]):
        assert answer(shared, query) == answer(engine.encode(CONTEXT), query)


def test_token_ids_may_be_a_tensor(tiny):
    from nemo_star import SamplingParams

    llm = LLM(tiny, attention={"block_size": 32})
    book, params = llm.encode(torch.tensor(CONTEXT)), SamplingParams(max_tokens=3)
    (one,) = llm.generate(book, torch.tensor([3, 4, 5]), params)
    two = llm.generate(book, [[3, 4, 5], torch.tensor([3, 4, 5])], params)
    assert [result.token_ids for result in two] == [one.token_ids] * 2
    assert one.text is None
    with pytest.raises(ValueError, match="no tokenizer: give token ids"):
        llm.generate(book, "text", params)
    with pytest.raises(ValueError, match="stop .* needs text"):
        llm.generate(book, [3], SamplingParams(stop=["."]))
    assert llm.generate(book, [], params) == []


def test_no_more_than_one_block_waits_in_the_device_s_queue(engine, monkeypatch):
    """What the bar counts is at most one block ahead of what is done."""
    queued, done = [], []

    def mark(device):
        number = len(queued)
        queued.append(number)
        return SimpleNamespace(synchronize=lambda: done.append(number))

    monkeypatch.setattr(encoding, "mark", mark)
    seen = []
    engine.encode([i * i % 251 for i in range(100)], on_block=lambda: seen.append((len(queued), len(done))))
    assert seen == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert done == [0, 1, 2]


@pytest.mark.parametrize("ends", ["finished", "abandoned"])
def test_what_a_stage_sent_on_does_not_outlive_the_prefill(engine, ends):
    waited = []
    tensor = torch.zeros(8)
    freed = weakref.ref(tensor)
    begun = engine.begin(CONTEXT)
    engine.stage._sending = SimpleNamespace(wait=lambda: waited.append(True)), tensor
    del tensor
    if ends == "finished":
        finished(begun)
    else:
        begun.abandon()
    assert waited == [True]
    assert freed() is None
