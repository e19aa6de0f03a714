import pytest

from nemo_star.partition import Partition


@pytest.mark.parametrize("cp_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("tokens", "block_size"), [(1, 16), (96, 32), (100, 32), (31, 32), (1000, 7)])
def test_blocks_cover_the_context_once_in_order(tokens, block_size, cp_size):
    partition = Partition(tokens, block_size, block_size, cp_size)
    blocks = [block for rank in range(cp_size) for block in partition.blocks_of(rank)]
    assert [t for block in blocks for t in range(block.start, block.stop)] == list(range(tokens))
    assert [block.index for block in blocks] == list(range(partition.num_blocks))
    assert sum(partition.tokens_of(rank) for rank in range(cp_size)) == tokens
    assert max(block.tokens for block in blocks) <= block_size


def test_ranks_differ_by_at_most_one_block_and_may_have_none():
    assert [len(Partition(150, 32, 8, 2).blocks_of(rank)) for rank in (0, 1)] == [3, 2]
    assert [len(Partition(32, 32, 8, 3).blocks_of(rank)) for rank in (0, 1, 2)] == [1, 0, 0]


def test_only_later_blocks_see_the_anchor():
    first, second, last = Partition(70, 32, 8, 1).blocks_of(0)
    assert (first.anchor_size, second.anchor_size, last.anchor_size) == (0, 8, 8)
    assert last.tokens == 6


@pytest.mark.parametrize("sizes", [(0, 4, 4), (8, 4, 5), (8, 0, 0)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="context is empty|do not fit"):
        Partition(*sizes, cp_size=1)
