import pytest

from nemo_star.attention.ring import visible_parts
from nemo_star.methods.partition import PARTITIONS, contiguous_partition, ring_partition, star_partition


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("tokens", "block_size"), [(1, 16), (96, 32), (100, 32), (31, 32), (1000, 7)])
def test_pieces_cover_the_context_once(kind, tokens, block_size, cp_size):
    partition = PARTITIONS[kind](tokens, block_size, block_size, cp_size)
    pieces = [piece for blocks in partition.ranks for block in blocks for piece in block.pieces]
    assert sorted(t for start, stop in pieces for t in range(start, stop)) == list(range(tokens))
    assert len(partition.ranks) == cp_size
    assert sum(partition.tokens_of(rank) for rank in range(cp_size)) == tokens
    if kind != "star":
        loads = [partition.tokens_of(rank) for rank in range(cp_size)]
        assert max(loads) - min(loads) <= 2


def test_star_deals_whole_blocks_and_ranks_differ_by_at_most_one():
    assert [len(blocks) for blocks in star_partition(150, 32, 8, 2).ranks] == [3, 2]
    assert [len(blocks) for blocks in star_partition(32, 32, 8, 3).ranks] == [1, 0, 0]
    assert [block.index for blocks in star_partition(150, 32, 8, 2).ranks for block in blocks] == [0, 1, 2, 3, 4]


def test_only_later_blocks_see_the_anchor():
    first, second, last = star_partition(70, 32, 8, 1).ranks[0]
    assert (first.anchor_size, second.anchor_size, last.anchor_size) == (0, 8, 8)
    assert last.tokens == 6


@pytest.mark.parametrize("sizes", [(8, 4, 5), (8, 0, 0)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="do not fit"):
        star_partition(*sizes, 1)


def test_zigzag_gives_each_rank_an_early_and_a_late_piece():
    partition = ring_partition(16, 16, 0, 2)
    assert [blocks[0].pieces for blocks in partition.ranks] == [((0, 4), (12, 16)), ((4, 8), (8, 12))]
    assert [blocks[0].pieces for blocks in contiguous_partition(5, 5, 0, 2).ranks] == [((0, 3),), ((3, 5),)]


@pytest.mark.parametrize("cp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 3, 7, 40, 41])
def test_ring_shows_each_token_exactly_the_tokens_up_to_itself(tokens, cp_size):
    ranks = ring_partition(tokens, tokens, 0, cp_size).ranks
    flat = [[t for start, stop in blocks[0].pieces for t in range(start, stop)] for blocks in ranks]
    for mine, queries in enumerate(flat):
        seen = {token: [] for token in queries}
        for theirs, keys in enumerate(flat):
            for rows, columns, causal in visible_parts(ranks[mine][0], ranks[theirs][0]):
                height, width = rows.stop - rows.start, columns.stop - columns.start
                for i, row in enumerate(queries[rows]):
                    seen[row] += keys[columns][: width - height + i + 1] if causal else keys[columns]
        assert all(sorted(visible) == list(range(token + 1)) for token, visible in seen.items())
