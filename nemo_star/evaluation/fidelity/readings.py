"""What is kept of attention mass: sums over rows, by layer and head, and in a few cells each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemo_star.evaluation.fidelity.mass import Rows
from nemo_star.methods.partition import Block
from nemo_star.parallel.groups import Groups, gather_objects

FIRST_TOKENS = 16
"""Of a block, and of the context: where sinks are looked for."""


class Reading:
    """Sums of what `reduce` makes of rows: [np, cells]."""

    def __init__(self, reduce: Callable[[Rows], Tensor]) -> None:
        self._reduce = reduce
        self._sums: dict[int, Tensor] = {}

    def __call__(self, layer_number: int, rows: Rows) -> None:
        cells = self._reduce(rows)
        before = self._sums.get(layer_number)
        self._sums[layer_number] = cells if before is None else before + cells

    def gathered(self, groups: Groups, layers: int) -> Tensor:
        """[layers, heads, cells] float64 of all ranks of the replica, which all ask; windowed layers have zeros."""
        mine = groups.tp.rank(), {number: sums.cpu() for number, sums in self._sums.items()}
        by_layer: dict[int, dict[int, Tensor]] = {}
        for tp_rank, sums in gather_objects(mine, groups.replica):
            for number, cells in sums.items():
                of_layer = by_layer.setdefault(number, {})
                of_layer[tp_rank] = of_layer[tp_rank] + cells if tp_rank in of_layer else cells
        whole = {number: torch.cat([parts[rank] for rank in sorted(parts)]) for number, parts in by_layer.items()}
        nothing = torch.zeros_like(next(iter(whole.values()))) if whole else torch.zeros(1, 1, dtype=torch.float64)
        return torch.stack([whole.get(number, nothing) for number in range(1, layers + 1)])


def hidden(rows: Rows, blocks: Sequence[Block]) -> Tensor:
    """A cell for each block: the mass of its tokens on earlier ones that its attention does not see."""
    cells = []
    for block in blocks:
        part = rows.between(*block.spans[0])
        before = part.mass((0, block.spans[0][0])).sum(dim=(1, 2))
        seen = sum(part.mass(span).sum(dim=(1, 2)) for span in (*block.sees, *block.overlap))
        cells.append((before - seen).clamp_min(0.0))
    return torch.stack(cells, dim=1)


def first_tokens(rows: Rows, blocks: Sequence[Block]) -> Tensor:
    """Cells for the first tokens of a block, then for those of the context: the mass on each from tokens that come
    later in the block; over all blocks after the first."""
    cells = []
    for (start, stop), count in later_spans(blocks):
        part = rows.between(start + count, stop)
        places = [part.mass(range(first, first + count + 1)).sum(dim=1) for first in (start, 0)]
        cells.append(torch.cat([torch.nn.functional.pad(mass, (0, FIRST_TOKENS - count)) for mass in places], dim=1))
    return torch.stack(cells).sum(dim=0) if cells else rows.below.new_zeros(rows.below.shape[0], 2 * FIRST_TOKENS)


def later_spans(blocks: Sequence[Block]) -> list[tuple[tuple[int, int], int]]:
    """Blocks after the first that are long enough to have tokens behind their first ones, and how many these are."""
    long = min(FIRST_TOKENS, (blocks[0].tokens + 1) // 2)
    return [(block.spans[0], long) for block in blocks[1:] if block.tokens > long]


def by_block(rows: Rows, blocks: Sequence[Block]) -> Tensor:
    """A cell for each block: the mass on its tokens. The first tokens of the context do not count: many heads that look
    for nothing look there (arXiv 2309.17453)."""
    skipped = min(FIRST_TOKENS, blocks[0].tokens)
    edges = [skipped, *(block.spans[0][1] for block in blocks)]
    return rows.mass(edges).sum(dim=1)


def sampled_rows(tokens: int, count: int, seed: int) -> Tensor:
    """[rows] int64, ascending: positions spread over the context, one at random of each of `count` equal parts."""
    count = min(count, tokens)
    edges = torch.arange(count + 1) * tokens // count
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return edges[:-1] + (drawn * edges.diff()).long()
