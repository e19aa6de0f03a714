"""What else may stand before a block: what is drawn and chosen, and what contexts that begin alike share."""

import pytest
import torch
from store_walk import answer, opened, text

from nemo_star import LLM
from nemo_star.attention.star import StarAttention
from nemo_star.attention.summary import summary_positions
from nemo_star.contexts.storage import load_context, save_context
from nemo_star.contexts.store import ContextStore
from nemo_star.engine.engine import finished
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.registry import method_of

ABLATED = {"block_size": 32, "anchor_size": 20, "anchor": "recompute"}
CASES = {
    "previous block": {**ABLATED, "anchor_content": "previous", "anchor_positions": "previous"},
    "random": {**ABLATED, "anchor_content": "random", "anchor_positions": "random"},
    "overlap": {"block_size": 32, "anchor_size": 20, "overlap_size": 15},
    "summary": {"kind": "summary", "block_size": 32, "anchor_size": 20, "chunk_size": 4},
}
VOCABULARY = 256


@pytest.fixture(scope="module", params=CASES)
def engine(request, tiny):
    return LLM(tiny, attention=CASES[request.param]).engine


def inputs(content, positions, ids, *, sizes=(32, 20)):
    """Of each block: the anchor's ids and positions."""
    block_size, anchor_size = sizes
    settings = {"anchor": "recompute", "anchor_content": content, "anchor_positions": positions}
    method = method_of(AttentionConfig(block_size=block_size, anchor_size=anchor_size, **settings))
    found = []
    for block in method.partition(len(ids), 1).ranks[0]:
        tokens, at = StarAttention.inputs(method, block, torch.tensor(ids, dtype=torch.int32), VOCABULARY)
        assert at[-block.tokens :].tolist() == list(range(*block.spans[0]))
        assert tokens[-block.tokens :].tolist() == ids[slice(*block.spans[0])]
        assert len(tokens) == method.tokens_in_flight(block)
        found.append((tokens[: -block.tokens].tolist(), at[: -block.tokens].tolist()))
    return found


def test_what_is_drawn_is_drawn_alike_and_follows_from_the_first_block():
    ids = text(1, 120)
    for content, positions in (("random", "random"), ("shuffled", "first")):
        drawn = inputs(content, positions, ids)
        assert drawn == inputs(content, positions, ids)
        assert drawn[:3] == inputs(content, positions, ids[:96] + text(2, 50))[:3]
        assert drawn[1] != inputs(content, positions, [ids[0] + 1, *ids[1:]])[1]
        assert drawn[0] == ([], [])
        assert drawn[1][0] == drawn[2][0] == drawn[3][0]


def test_random_tokens_are_of_the_vocabulary_and_shuffled_ones_of_the_first_block():
    ids = [7] * 10 + text(1, 5000)
    (_, (random, _), *_) = inputs("random", "first", ids, sizes=(2500, 2500))
    assert min(random) < 5
    assert VOCABULARY - 5 < max(random) < VOCABULARY
    (_, (shuffled, _), *_) = inputs("shuffled", "first", ids, sizes=(2500, 2500))
    assert shuffled != ids[:2500]
    assert sorted(shuffled) == sorted(ids[:2500])
    (_, (constant, _), *_) = inputs("constant", "first", [5, 9, 5, 9, 9, *text(1, 50)], sizes=(10, 5))
    assert constant == [9] * 5


def test_random_positions_lie_before_the_block_each_once_and_in_order():
    drawn = [at for _, at in inputs("first", "random", text(1, 400))[1:]]
    for number, positions in enumerate(drawn, 1):
        assert positions == sorted(set(positions))
        assert len(positions) == 20
        assert 0 <= positions[0] <= positions[-1] < 32 * number
    assert drawn[-1][-1] > 200


@pytest.mark.parametrize(
    "changes", [{"anchor_content": "random"}, {"anchor_positions": "previous"}, {"anchor_content": "constant"}]
)
def test_what_cannot_be_shared_or_windowed_is_refused(changes):
    with pytest.raises(ValueError, match=r"anchor_content=.*anchor_positions=.*set attention.anchor=recompute"):
        method_of(AttentionConfig(**changes))
    method_of(AttentionConfig(kind="summary", **changes))  # which does not use them
    with pytest.raises(ValueError, match="does not take models with windowed layers"):
        method_of(AttentionConfig(anchor="recompute", **changes), windows=True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"overlap_size": -1}, "attention.overlap_size=-1 must be 0"),
        ({"overlap_size": 33, "block_size": 32}, "overlap_size=33 is larger than attention.block_size=32"),
    ],
)
def test_an_overlap_is_a_part_of_a_block(sizes, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**sizes)


def test_an_overlap_is_no_larger_than_a_block_whose_size_follows_from_the_context():
    method = method_of(AttentionConfig(overlap_size=26, anchor_size=0))
    assert method.describe(104).endswith("(shared), overlap of 26 tokens")
    assert method.describe(100).endswith("overlap of 25 tokens")
    assert [block.overlap for block in method.partition(100, 1).ranks[0]] == [(), ((0, 25),), ((25, 50),), ((50, 75),)]
    assert method.pinned(100).settings.overlap_size == method.resized(25).settings.overlap_size == 25
    assert method_of(AttentionConfig(kind="summary", overlap_size=26)).resized(4).settings.overlap_size == 0


def test_blocks_do_not_overlap_in_the_ablation():
    with pytest.raises(ValueError, match="anchor_content=random.*set attention.overlap_size=8 to 0"):
        method_of(AttentionConfig(anchor="recompute", anchor_content="random", overlap_size=8))


def test_a_summary_does_not_overlap():
    sizes = {"kind": "summary", "block_size": 32, "anchor_size": 20, "chunk_size": 4}
    plain, with_overlap = (method_of(AttentionConfig(**sizes, overlap_size=size)) for size in (0, 32))
    assert with_overlap.partition(100, 2) == plain.partition(100, 2)
    assert with_overlap.pinned(100).overlap_size == 0


def test_a_summary_is_not_for_windows():
    with pytest.raises(ValueError, match="attention=summary does not take models with windowed layers"):
        method_of(AttentionConfig(kind="summary"), windows=True)


def summary(ids, **settings):
    method = method_of(AttentionConfig(kind="summary", **settings))
    return summary_positions(method, torch.tensor(ids, dtype=torch.int32)).tolist()


def test_the_chunks_with_the_rarest_tokens_are_chosen():
    sizes = {"block_size": 40, "anchor_size": 22, "sink_size": 2, "chunk_size": 10}
    ids = [1, 2, 3, 4, 5] * 30
    ids[61] = ids[93] = 9
    # Block 0 has nothing rare: its first whole chunk after the sink; of block 1 the one with the needle.
    assert summary(ids, **sizes) == [0, 1, *range(2, 12), *range(60, 70)]
    ids[115] = 8  # rarer than what comes twice, and in a block that gives no chunk: there are two for three blocks
    assert summary(ids, **sizes) == [0, 1, *range(2, 12), *range(60, 70)]
    more = {**sizes, "anchor_size": 32}
    assert summary(ids, **more) == [0, 1, *range(2, 12), *range(60, 70), *range(110, 120)]


def test_a_sum_decides_between_chunks_whose_rarest_tokens_are_as_rare():
    ids = [1, 2, 3, 4] * 16
    ids[4], ids[8], ids[9] = 10, 11, 12
    assert summary(ids, block_size=32, anchor_size=4, sink_size=0, chunk_size=4) == [8, 9, 10, 11]


def test_a_summary_keeps_its_sizes():
    method = method_of(AttentionConfig(kind="summary", chunk_size=10))
    assert method.sizes(1000) == (250, 54)
    assert method.pinned(1000).sizes(5000) == (250, 54)
    assert method.resized(100).sizes(1000) == (100, 24)
    assert method_of(AttentionConfig(kind="summary", block_size=8, anchor_size=2)).sizes(100) == (8, 2)


def same(engine, one, other):
    return float((answer(engine, one) - answer(engine, other)).abs().max()) <= 5e-4


def test_what_is_reused_and_what_goes_on_is_what_would_be_encoded(engine):
    """Blocks before which nothing changes; of a summary none, because what is chosen depends on the whole."""
    store = ContextStore(engine, budget_bytes=2**40, fingerprint="weights")
    ids, more = text(1, 70) + text(2, 110), text(3, 30)
    first, _ = opened(store, text(1, 100))
    before = answer(engine, first)
    context, took = opened(store, ids)
    assert took == (6 if engine.method.kind == "summary" else 4)
    assert same(engine, context, engine.encode(ids))
    assert torch.equal(answer(engine, first), before)
    finished(engine.extend(context, more))
    assert context.cache.tokens == context.tokens == 210
    assert same(engine, context, engine.encode(ids + more))


def test_a_saved_context_keeps_what_it_was_encoded_with(engine, tiny, tmp_path):
    context = engine.encode(text(1, 100))
    save_context(engine, context, tmp_path / "saved", fingerprint="weights")
    loaded = load_context(engine, tmp_path / "saved", fingerprint="weights")
    assert loaded.method.settings == context.method.settings
    assert torch.equal(answer(engine, loaded), answer(engine, context))
    finished(engine.extend(loaded, text(2, 60)))
    assert same(engine, loaded, engine.encode(text(1, 100) + text(2, 60)))
