"""When a job counts as hanging: by steps of all ranks, on a clock of the test's own."""

import pytest
import torch
import torch.distributed as dist

from nemo_star.watchdog import Watchdog


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
    return Watchdog(store, 1, clock=clock), Watchdog(store, 1, clock=clock)


def looks(pair):
    return [watchdog.is_hanging() for watchdog in pair]


def test_nobody_steps(pair, clock):
    looks(pair)
    clock.now = 59
    assert looks(pair) == [False, False]
    clock.now = 61
    assert looks(pair) == [True, True]


def test_a_rank_may_wait_for_as_long_as_another_works(pair, clock):
    for clock.now in range(0, 600, 30):
        pair[0].step("layer 1")
        assert looks(pair) == [False, False]
    for clock.now in (600, 630):
        assert looks(pair) == [False, False]
    clock.now = 700
    assert looks(pair) == [True, True]


def test_reading_what_somebody_types_is_no_hang(pair, clock):
    seen = []

    def read():
        for clock.now in range(0, 600, 30):
            seen.extend(looks(pair))
        return "typed"

    assert pair[0].patient(read)() == "typed"
    assert not any(seen)
    assert len(seen) == 40
    looks(pair)
    clock.now += 61
    assert looks(pair) == [True, True]


def test_a_pass_of_a_layer_is_a_step(pair, clock):
    layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    pair[0].follow(layers)
    looks(pair)
    for clock.now in (50, 100, 150):
        layers[1](torch.zeros(1))
        assert looks(pair) == [False, False]
