from types import SimpleNamespace

import pytest
import torch

from nemo_star.attention.preceding import PrecedingKV
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


def test_in_a_model_with_windows_star_deals_blocks_out_in_turn():
    method = method_of(AttentionConfig(block_size=32), windows=True)
    partition = method.partition(150, 2)
    assert [[block.index for block in blocks] for blocks in partition.ranks] == [[0, 2, 4], [1, 3]]
    assert partition.rounds == 3
    assert method.resized(64).in_rounds


@pytest.mark.parametrize("kind", ["ring", "star"])
@pytest.mark.parametrize("window", [1, 2, 6, 9, 40])
@pytest.mark.parametrize(
    ("tokens", "block_size", "cp_size"), [(41, 5, 1), (41, 5, 3), (40, 10, 4), (7, 3, 4), (61, 4, 4)]
)
def test_what_windowed_layers_see_before_a_block_is_there(kind, window, tokens, block_size, cp_size):
    """A token's K is its position. Ranks ask one after the other, and what the others send is delivered by hand."""
    partition = method_of(AttentionConfig(kind=kind, block_size=block_size), windows=True).partition(tokens, cp_size)
    mail = {}
    ranks = [HandDelivered(rank, partition, mail, window=window) for rank in range(cp_size)]
    for number in range(partition.rounds):
        for rank in ranks:
            rank.send(number)
        for rank in ranks:
            k = rank.keys(number)
            starts = [start for start, stop in rank.spans(number) if start < stop]
            found = rank.before(1, k, -k, number)
            assert [keys.flatten().tolist() for keys, _ in found] == [
                list(range(max(0, start - window + 1), start)) for start in starts
            ]
            assert all(torch.equal(values, -keys) for keys, values in found)
    assert not mail
    assert not any(rank._kept for rank in ranks)


class HandDelivered(PrecedingKV):
    def __init__(self, rank, partition, mail, *, window):
        self.rank, self.blocks, self.mail = rank, partition.ranks[rank], mail
        super().__init__(SimpleNamespace(rank=lambda: rank), partition, window=window, cached_from=0)

    def spans(self, number):
        return self.blocks[number].spans if number < len(self.blocks) else ()

    def keys(self, number):
        positions = [float(token) for start, stop in self.spans(number) for token in range(start, stop)]
        return torch.tensor(positions).view(-1, 1, 1, 1)

    def send(self, number):
        """What the others take of what this rank has: kept of earlier rounds, and this round's."""
        kept = {token for span, k, _ in self._kept.get(1, []) for token in k.flatten().tolist()}
        held = kept | set(self.keys(number).flatten().tolist())
        for other, spans in self._rounds[number].sent.items():
            assert all(token in held for span in spans for token in range(*span))
            self.mail[self.rank, other] = spans

    def _exchanged(self, planned, held, like):
        arrived = []
        for other, spans in planned.taken.items():
            if other != self.rank:
                assert self.mail.pop((other, self.rank)) == spans
                for span in spans:
                    k = torch.arange(*span, dtype=torch.float32).view(-1, 1, 1, 1)
                    arrived.append((span, k, -k))
        return arrived


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
