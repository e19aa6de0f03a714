"""When a job counts as hanging: by steps of all ranks, on a clock of the test's own."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nemo_star.runtime import watchdog
from nemo_star.runtime.watchdog import Watchdog


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pair(clock):
    """The watchdogs of two ranks, a minute's patience each."""
    store = dist.HashStore()
    return [Watchdog(lambda: store, 1, rank=rank, clock=clock) for rank in range(2)]


def pass_time(clock, pair, seconds, work=lambda: None):
    """Looks of both every 10 s for so long, `work` before each; what the last ones say."""
    for _ in range(0, seconds, 10):
        clock.now += 10
        work()
        said = [watchdog.is_hanging() for watchdog in pair]
    return said


def test_nobody_steps(pair, clock):
    assert pass_time(clock, pair, 70) == [False, False]  # the first look counts as a step
    assert pass_time(clock, pair, 10) == [True, True]


def test_a_rank_may_wait_for_as_long_as_another_works(pair, clock):
    assert pass_time(clock, pair, 600, lambda: pair[0].step("layer 1")) == [False, False]
    assert pass_time(clock, pair, 60) == [False, False]
    assert pass_time(clock, pair, 20) == [True, True]


def test_work_that_may_take_long_is_no_hang(pair, clock):
    with pair[0].suspended("reading requests"):
        assert pass_time(clock, pair, 600) == [False, False]
    assert pass_time(clock, pair, 90) == [True, True]


def test_a_call_within_a_suspended_time_is_watched(pair, clock):
    with pair[0].suspended("the caller's own work"):
        with pair[0].resumed():
            assert pass_time(clock, pair, 90) == [True, True]
        assert pass_time(clock, pair, 90) == [False, False]


def test_a_pass_of_a_layer_is_a_step(pair, clock):
    layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    pair[0].watch_layers(layers, torch.device("cpu"))
    assert pass_time(clock, pair, 300, lambda: layers[1](torch.zeros(1))) == [False, False]


class Device:
    """That does a layer in so many seconds of the test's clock, after what was queued before."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.free = clock, seconds, 0.0

    def mark(self, device):
        self.free = done = max(self.free, self.clock()) + self.seconds
        return SimpleNamespace(query=lambda: self.clock() >= done)


def test_a_layer_counts_when_the_device_has_done_it(pair, clock, monkeypatch):
    """All is queued at once; then the host waits, for ten times as long as the patience."""
    monkeypatch.setattr(watchdog, "mark", Device(clock, seconds=50).mark)
    layers = torch.nn.ModuleList([torch.nn.Identity() for _ in range(12)])
    pair[0].watch_layers(layers, torch.device("cuda", 0))
    for layer in layers:
        layer(torch.zeros(1))
    for _ in range(60):
        assert pass_time(clock, pair, 10) == [False, False]
    assert "rank 0: layer 12 of its stage" in pair[0].report()
    assert pass_time(clock, pair, 80) == [True, True]


def test_a_layer_that_the_device_never_ends_is_a_hang(pair, clock, monkeypatch):
    device = Device(clock, seconds=10)
    monkeypatch.setattr(watchdog, "mark", device.mark)
    layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    pair[0].watch_layers(layers, torch.device("cuda", 0))
    layers[0](torch.zeros(1))
    device.seconds = 1e9
    layers[1](torch.zeros(1))
    assert pass_time(clock, pair, 20) == [False, False]
    assert pass_time(clock, pair, 70) == [True, True]
    assert "rank 0: layer 1 of its stage" in pair[0].report()


def test_a_job_stopped_and_continued_is_no_hang(pair, clock):
    pass_time(clock, pair, 30)
    clock.now += 3600
    assert pass_time(clock, pair, 10) == [False, False]
    assert pass_time(clock, pair, 70) == [True, True]


def test_the_report_has_every_rank_where_it_was_last(pair, clock, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    pair[1].step("layer 7 of its stage")
    pass_time(clock, pair, 10)
    assert (
        pair[0]
        .report()
        .endswith("Last seen at: rank 0: the start; rank 1: layer 7 of its stage; rank 2: no sign of life")
    )
