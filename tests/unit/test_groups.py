"""Process groups: which communicators a layout makes, by recorded calls."""

import pytest
import torch.distributed as dist

from nemo_star.parallel.groups import create_groups
from nemo_star.parallel.layout import Layout

NAMES = ("tp", "cp", "pp", "dp", "tp_cp", "dp_cp")


@pytest.fixture
def made(monkeypatch):
    """Makes the groups of a layout as rank 0 of so many; gives them, and what torch was asked for."""

    def make(layout, **options):
        asked = []

        def enumerate_groups(members, **keywords):
            asked.append(sorted(map(tuple, members)))
            return (tuple(next(ranks for ranks in members if 0 in ranks)), len(asked)), None

        monkeypatch.setattr(dist, "get_world_size", lambda: layout.tp * layout.cp * layout.dp * layout.pp)
        monkeypatch.setattr(dist, "new_subgroups_by_enumeration", enumerate_groups)
        return create_groups(layout, **options), asked

    return make


def expected(layout, *dimensions):
    """Ranks of rank 0's group: tp fastest, then cp, dp, pp, counted by hand."""
    strides = {"tp": 1, "cp": layout.tp, "dp": layout.tp * layout.cp, "pp": layout.tp * layout.cp * layout.dp}
    ranks = {0}
    for name in dimensions:
        ranks = {rank + step * strides[name] for rank in ranks for step in range(getattr(layout, name))}
    return tuple(sorted(ranks))


@pytest.mark.parametrize(
    ("layout", "communicators"),
    [
        (Layout(tp=1, cp=1, dp=1, pp=1), 1),
        (Layout(tp=1, cp=8, dp=1, pp=1), 2),  # cp, and ranks alone
        (Layout(tp=4, cp=2, dp=1, pp=1), 4),  # tp, cp, tp_cp, ranks alone; dp_cp is cp, the replica tp_cp
        (Layout(tp=2, cp=2, dp=2, pp=2), 7),
    ],
)
def test_groups_of_equal_members_are_one(made, layout, communicators):
    groups, asked = made(layout)
    assert len(asked) == communicators
    assert len({tuple(members) for members in asked}) == len(asked)
    for name in NAMES:
        assert getattr(groups.collection, name)[0] == expected(layout, *name.split("_"))
    assert groups.replica[0] == expected(layout, "tp", "cp", "pp")


def test_experts_have_a_communicator_of_their_own(made):
    groups, asked = made(Layout(tp=1, cp=4, dp=1, pp=1, ep=4))
    assert groups.collection.ep[0] == groups.cp[0]
    assert groups.collection.ep is not groups.cp
    assert groups.replica is groups.cp is groups.collection.tp_cp
    assert len(asked) == 3
