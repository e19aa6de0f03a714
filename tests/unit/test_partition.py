import pytest

from nemo_star.attention.ring import visible_spans
from nemo_star.methods.config import AttentionConfig
from nemo_star.methods.partition import contiguous, length
from nemo_star.methods.registry import known_kinds, method_class, method_of


def star(tokens, block_size, anchor_size, cp_size):
    settings = AttentionConfig(block_size=block_size, anchor_size=anchor_size)
    return method_of(settings).partition(tokens, cp_size)


def ring(tokens, cp_size):
    return method_of(AttentionConfig(kind="ring")).partition(tokens, cp_size)


@pytest.mark.parametrize("kind", known_kinds())
@pytest.mark.parametrize("cp_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("tokens", "block_size"), [(1, 16), (96, 32), (100, 32), (31, 32), (1000, 7)])
def test_spans_cover_the_context_once(kind, tokens, block_size, cp_size):
    partition = method_of(AttentionConfig(kind=kind, block_size=block_size)).partition(tokens, cp_size)
    spans = [span for blocks in partition.ranks for block in blocks for span in block.spans]
    assert sorted(t for start, stop in spans for t in range(start, stop)) == list(range(tokens))
    assert len(partition.ranks) == cp_size
    assert sum(partition.tokens_of(rank) for rank in range(cp_size)) == tokens
    if not method_class(kind).has_blocks:
        loads = [partition.tokens_of(rank) for rank in range(cp_size)]
        assert max(loads) - min(loads) <= 2


def test_star_deals_whole_blocks_and_ranks_differ_by_at_most_one():
    assert [len(blocks) for blocks in star(150, 32, 8, 2).ranks] == [3, 2]
    assert [len(blocks) for blocks in star(32, 32, 8, 3).ranks] == [1, 0, 0]
    assert [block.index for blocks in star(150, 32, 8, 2).ranks for block in blocks] == [0, 1, 2, 3, 4]


def test_only_later_blocks_see_the_anchor():
    first, second, last = star(70, 32, 8, 1).ranks[0]
    assert [length(block.sees) for block in (first, second, last)] == [0, 8, 8]
    assert last.tokens == 6


def test_zigzag_gives_each_rank_an_early_and_a_late_span():
    partition = ring(16, 2)
    assert [blocks[0].spans for blocks in partition.ranks] == [((0, 4), (12, 16)), ((4, 8), (8, 12))]
    assert [blocks[0].spans for blocks in contiguous(5, 2).ranks] == [((0, 3),), ((3, 5),)]


@pytest.mark.parametrize("cp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 3, 7, 40, 41])
def test_ring_shows_each_token_exactly_the_tokens_up_to_itself(tokens, cp_size):
    ranks = ring(tokens, cp_size).ranks
    flat = [[t for start, stop in blocks[0].spans for t in range(start, stop)] for blocks in ranks]
    for mine, queries in enumerate(flat):
        seen = {token: [] for token in queries}
        for theirs, keys in enumerate(flat):
            for rows, columns, causal in visible_spans(ranks[mine][0], ranks[theirs][0]):
                height, width = rows.stop - rows.start, columns.stop - columns.start
                for i, row in enumerate(queries[rows]):
                    seen[row] += keys[columns][: width - height + i + 1] if causal else keys[columns]
        assert all(sorted(visible) == list(range(token + 1)) for token, visible in seen.items())
