"""A store of contexts, in one process: what is found, what is reused, what goes."""

import pytest
import torch
from store_walk import answer, opened, text, walk

from nemo_star import LLM
from nemo_star.contexts.prefix import first_tokens, gone_on
from nemo_star.contexts.store import ContextStore
from nemo_star.engine.context import EncodedContext
from nemo_star.engine.engine import finished
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.registry import method_of

LARGE = 2**40


@pytest.fixture(scope="module")
def engine(tiny):
    return LLM(tiny, attention={"block_size": 32}).engine


@pytest.fixture(scope="module")
def dense(tiny):
    return LLM(tiny, attention={"kind": "dense"}).engine


def store_of(engine, budget=LARGE, folder=None, **options):
    return ContextStore(engine, budget_bytes=budget, fingerprint="weights", folder=folder, **options)


def size_of(engine, tokens):
    context = engine.encode(text(0, tokens))
    return context.cache.nbytes


def same(engine, one, other):
    return float((answer(engine, one) - answer(engine, other)).abs().max()) <= 5e-4


@pytest.mark.parametrize("with_folder", [False, True])
@pytest.mark.parametrize("kind", ["star", "dense"])
def test_a_random_walk_over_five_texts_in_a_store_for_two(engine, dense, tmp_path, kind, with_folder):
    worst, encoded = walk({"star": engine, "dense": dense}[kind], tmp_path if with_folder else None)
    assert worst <= 5e-4
    assert (encoded <= 5) if with_folder else (encoded > 5)


def test_a_known_text_is_the_same_context(engine):
    store, ids = store_of(engine), text(1, 100)
    context, took = opened(store, ids)
    assert took == 4
    assert store.open(torch.tensor(ids)) is context
    assert store.used_bytes == context.cache.nbytes
    assert not isinstance(store.open([*ids[:-1], 250]), EncodedContext)


def test_the_same_text_twice_under_way_is_encoded_once(engine):
    store, ids = store_of(engine), text(1, 100)
    encoding = store.open(ids)
    encoding.advance()
    assert store.open(ids) is encoding
    store.forget(encoding.context)
    assert store.used_bytes == 0
    assert store.open(ids) is not encoding


@pytest.mark.parametrize(("known", "common", "steps"), [(128, 128, 2), (100, 96, 3), (100, 70, 4), (100, 31, 6)])
def test_blocks_that_are_known_are_not_encoded_again(engine, known, common, steps):
    store = store_of(engine)
    ids = text(1, known)
    first, _ = opened(store, ids)
    longer = ids[:common] + text(2, 180 - common)
    before = answer(engine, first)
    context, took = opened(store, longer)
    assert took == steps
    assert same(engine, context, engine.encode(longer))
    assert torch.equal(answer(engine, first), before)
    finished(engine.extend(context, text(3, 30)))
    assert same(engine, context, engine.encode(longer + text(3, 30)))


def test_a_beginning_of_whole_blocks_is_there_at_once(engine):
    store, ids = store_of(engine), text(1, 100)
    opened(store, ids)
    context = store.open(ids[:64])
    assert isinstance(context, EncodedContext)
    assert context.tokens == context.cache.tokens == 64
    assert same(engine, context, engine.encode(ids[:64]))
    assert store.open(ids[:64]) is context


def test_blocks_of_other_sizes_are_not_taken(tiny):
    """Without a block size it follows from the length: another result must not come of what else is in the store."""
    engine = LLM(tiny).engine
    store, ids = store_of(engine), text(1, 100)
    opened(store, ids)
    assert opened(store, ids + text(2, 20))[1] == 4
    assert isinstance(store.open(ids), EncodedContext)


def test_exact_methods_go_on_from_any_token_where_that_pays(dense):
    store, ids = store_of(dense), text(1, 100)
    context, _ = opened(store, ids)
    longer, _ = opened(store, [*ids, 7])
    assert longer.partition.ranks[0][-1].spans == ((100, 101),)
    assert same(dense, longer, dense.encode([*ids, 7]))
    assert context.tokens == 100


def test_owners_do_not_find_each_other(engine, tmp_path):
    store, ids = store_of(engine, folder=tmp_path), text(1, 100)
    mine, _ = opened(store, ids, owner="anna")
    other, took = opened(store, [*ids, 5], owner="bert")
    assert took == 4
    _, took = opened(store, ids, owner="bert")
    assert took > 0
    store.close()
    assert not any("anna" in str(file) for file in tmp_path.rglob("*"))
    store = store_of(engine, folder=tmp_path)
    assert not isinstance(store.open(ids), EncodedContext)
    assert isinstance(store.open(ids, owner="anna"), EncodedContext)
    store.forget_owner("anna")
    assert store.open(ids, owner="anna").steps_left == 4
    assert isinstance(store.open(ids, owner="bert"), EncodedContext)
    assert not isinstance(store_of(engine, folder=tmp_path, salt="other").open(ids, owner="bert"), EncodedContext)


def test_a_later_process_finds_what_was_saved(engine, dense, tmp_path):
    store, ids = store_of(engine, folder=tmp_path), text(1, 100)
    opened(store, ids)
    store.close()
    assert store.used_bytes == 0
    again = store_of(engine, folder=tmp_path)
    context, took = opened(again, ids[:96] + text(2, 60))  # its beginning is on disk
    assert took == 2
    assert same(engine, context, engine.encode(ids[:96] + text(2, 60)))
    context = again.open(ids)
    assert isinstance(context, EncodedContext)
    assert same(engine, context, engine.encode(ids))
    again.close()
    for other in (
        ContextStore(engine, budget_bytes=LARGE, fingerprint="other", folder=tmp_path),
        store_of(dense, folder=tmp_path),
    ):
        assert not isinstance(other.open(ids), EncodedContext)


def test_a_damaged_context_is_encoded_again(engine, tmp_path, capsys):
    store, ids = store_of(engine, folder=tmp_path), text(1, 100)
    opened(store, ids)
    store.close()
    (file,) = tmp_path.rglob("cp0-*")
    file.write_bytes(b"")
    for asked in (ids, [*ids, 4]):
        context, took = opened(store_of(engine, folder=tmp_path), asked)
        assert took == 4
        assert same(engine, context, engine.encode(asked))
    assert "has 0 bytes, should have" in capsys.readouterr().err


def test_a_full_disk_drops_what_goes(engine, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    store = store_of(engine, size_of(engine, 100), folder=tmp_path)
    opened(store, text(1, 100))
    monkeypatch.setattr("nemo_star.contexts.storage.write_tensors", full)
    opened(store, text(2, 100))
    assert "No space left on device; it is encoded again when it is asked for" in capsys.readouterr().err
    assert store.open(text(1, 100)).steps_left == 4
    assert not list(tmp_path.glob("*/*"))


def test_pinned_contexts_stay(engine):
    store = store_of(engine, 2 * size_of(engine, 100))
    first, _ = opened(store, text(1, 100))
    second, _ = opened(store, text(2, 100))
    store.pin(first)
    store.pin(second)
    assert store.open(text(3, 100)) is None
    assert not store.reserve(100)
    store.release(second)
    assert store.reserve(100)
    with pytest.raises(ValueError, match="not in the store: keep it first"):
        store.pin(second)
    assert store.open(text(1, 100)) is first
    third, _ = opened(store, text(3, 100))
    store.release(first)
    store.pin(third)
    with pytest.raises(ValueError, match=r"of 201 tokens takes \d+ bytes on the fullest rank, more than the budget of"):
        store.open(text(4, 201))
    with pytest.raises(ValueError, match="a context of 0 tokens"):
        store.open([])
    assert store.open(text(1, 100)) is first


def test_the_one_used_last_stays(engine):
    store = store_of(engine, 2 * size_of(engine, 100))
    first, _ = opened(store, text(1, 100))
    opened(store, text(2, 100))
    store.open(text(1, 100))
    opened(store, text(3, 100))
    assert store.open(text(1, 100)) is first
    assert not isinstance(store.open(text(2, 100)), EncodedContext)


def test_a_text_that_grows_in_a_store_for_one(engine):
    """The known beginning's memory becomes that of the longer text; who still held it is told."""
    store, ids = store_of(engine, size_of(engine, 150)), text(1, 100)
    context, _ = opened(store, ids)
    sequence = engine.sequence(context)
    longer, took = opened(store, ids + text(2, 40))
    assert took == 2
    assert same(engine, longer, engine.encode(ids + text(2, 40)))
    with pytest.raises(ValueError, match="has gone on since"):
        engine.decode([(sequence, [1])])


def test_a_context_that_has_gone_on_is_kept_anew(engine):
    store, ids, more = store_of(engine), text(1, 100), text(2, 40)
    context, _ = opened(store, ids)
    finished(engine.extend(context, more))
    assert not isinstance(store.open([*ids, 1, 2]), EncodedContext)
    assert store.keep(context)
    assert store.open(ids + more) is context
    assert not isinstance(store.open(ids), EncodedContext)
    assert not store.keep(engine.encode(ids + more))
    store.forget(context)
    assert not isinstance(store.open(ids + more), EncodedContext)


def test_a_store_needs_a_budget_and_a_folder(engine, tmp_path):
    with pytest.raises(ValueError, match="budget_bytes=0: a store of contexts needs at least 1 byte"):
        store_of(engine, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="contexts cannot be kept in"):
        store_of(engine, folder=tmp_path / "file")


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("kind", ["star", "ring", "ulysses"])
def test_the_first_tokens_of_a_partition_go_on(kind, windows):
    method = method_of(AttentionConfig(kind=kind, block_size=16), windows=windows)
    partition = first_tokens(method.partition(100, 3), 48)
    assert sorted(token for rank in range(3) for span in partition.spans_of(rank) for token in range(*span)) == list(
        range(48)
    )
    longer = gone_on(method, partition, 5000)
    spans = [longer.spans_of(rank) for rank in range(3)]
    assert sorted(token for of_rank in spans for span in of_rank for token in range(*span)) == list(range(5000))
    assert all(list(of_rank) == sorted(of_rank) for of_rank in spans)
