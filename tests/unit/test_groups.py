"""Process groups: which communicators a layout makes, by recorded calls."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nemo_star.parallel.groups import barrier, create_groups
from nemo_star.parallel.layout import Layout
from nemo_star.runtime.launch import check_launcher

NAMES = ("tp", "cp", "pp", "dp", "tp_cp", "dp_cp")


@pytest.fixture
def made(monkeypatch):
    """Makes the groups of a layout as rank 0; gives them, and members and options of what torch was asked for."""

    def make(layout, *, backend="gloo", **options):
        asked, given = [], []

        def enumerate_groups(members, **keywords):
            asked.append(sorted(map(tuple, members)))
            given.append(keywords["pg_options"])
            return (tuple(next(ranks for ranks in members if 0 in ranks)), len(asked)), None

        monkeypatch.setattr(dist, "get_world_size", lambda: layout.tp * layout.cp * layout.dp * layout.pp)
        monkeypatch.setattr(dist, "get_backend", lambda: backend)
        monkeypatch.setattr(dist, "new_subgroups_by_enumeration", enumerate_groups)
        groups = create_groups(layout, **options)
        return groups, asked, given

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
    groups, asked, _ = made(layout)
    assert len(asked) == communicators
    assert len({tuple(members) for members in asked}) == len(asked)
    for name in NAMES:
        assert getattr(groups.collection, name)[0] == expected(layout, *name.split("_"))
    assert groups.replica[0] == expected(layout, "tp", "cp", "pp")


def test_experts_have_a_communicator_of_their_own(made):
    groups, asked, _ = made(Layout(tp=1, cp=4, dp=1, pp=1, ep=4))
    assert groups.collection.ep[0] == groups.cp[0]
    assert groups.collection.ep is not groups.cp
    assert groups.replica is groups.cp is groups.collection.tp_cp
    assert len(asked) == 3


def test_few_thread_blocks_are_for_the_cp_group_alone(made, monkeypatch):
    class Options:  # of a torch with CUDA
        def __init__(self):
            self.config = SimpleNamespace(max_ctas=32)

    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    layout = Layout(tp=1, cp=4, dp=1, pp=1)
    groups, asked, given = made(layout, backend="nccl", cp_max_ctas=4)
    limited = [members for members, options in zip(asked, given, strict=True) if options is not None]
    assert limited == [[groups.cp[0]]]
    assert [options.config.max_ctas for options in given if options is not None] == [4]
    assert groups.replica is groups.collection.tp_cp is not groups.cp
    assert groups.replica[0] == groups.cp[0]
    for settings in ({"backend": "nccl"}, {"cp_max_ctas": 4}):  # not asked for; gloo, which has no such thing
        groups, _, given = made(layout, **settings)
        assert set(given) == {None}
        assert groups.replica is groups.cp


def test_a_barrier_names_its_device_on_gpus(monkeypatch):
    said = []
    monkeypatch.setattr(dist, "barrier", lambda group, device_ids: said.append((group, device_ids)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for backend in ("nccl", "gloo"):
        monkeypatch.setattr(dist, "get_backend", lambda group, backend=backend: backend)
        barrier("some ranks")
    assert said == [("some ranks", [3]), ("some ranks", None)]


TORCHRUN = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), "1")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, None),
        (TORCHRUN, None),
        ({**TORCHRUN, "OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "LOCAL_RANK, LOCAL_WORLD_SIZE not"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "set RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID"),
    ],
)
def test_processes_that_would_not_find_each_other_are_refused(monkeypatch, environment, message):
    for name in (*TORCHRUN, "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)) if message else nullcontext():
        check_launcher()
