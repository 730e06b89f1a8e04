"""Who is called slow, and when; the ranks' own times as a clock of the test has them."""

import time

import pytest
import torch

from foreroute.engine.metrics.stragglers import SlowRank, skew
from foreroute.engine.metrics.timers import OwnTime
from foreroute.engine.parallel.in_flight import HostLog


def test_the_slowest_rank_and_its_ratio():
    assert skew((10, 30, 11, 12)) == (1, 30 / 11)  # the docstring's
    assert skew((10, 20)) == (1, 2.0)
    assert skew((5.0,)) == (0, 1.0)
    assert skew((0.0, 0.0)) == (0, 1.0)  # nothing measured yet
    assert skew((7, 7, 7)) == (0, 1.0)


def test_a_rank_is_named_once_when_it_stays_slow_and_again_when_it_recovers():
    watch, said = SlowRank(), []
    even, slow, other = (10, 11, 10, 12), (10, 11, 31, 12), (40, 10, 10, 10)
    for window in (even, slow, even, slow, slow, slow, other, other, even):
        said.append(watch.lines(window))
    assert said[:4] == [[], [], [], []]  # one window may be bad luck
    assert said[4] == [
        "rank 2 is slow: 31.0 ms of its own in a step's forward passes, 2.8 times the median rank's; the others wait"
        " for it"
    ]
    assert said[5] == [] and said[6] == ["rank 2 is no longer slow"]
    assert [line.split(":")[0] for line in said[7]] == ["rank 0 is slow"]
    assert said[8] == ["rank 0 is no longer slow"]


def test_equal_ranks_are_not_slow():
    watch = SlowRank()
    assert all(watch.lines((10, 14, 10.5, 12)) == [] for _ in range(5))


class Wire:
    def __init__(self):
        self.log = HostLog()

    def mark(self):
        return self.log.mark()

    def exposed_ms(self, begin, end):
        return self.log.exposed_ms(begin, end)


@pytest.mark.parametrize("waits", [True, False])
def test_own_time_leaves_out_what_was_waited_for_in_forward(monkeypatch, waits):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    wire = Wire() if waits else None
    own = OwnTime(torch.device("cpu"), wire)
    for forward, waited in ((0.5, 0.2), (0.25, 0.1)):
        with own.forward():
            now[0] += forward
            if wire is not None:
                wire.log.exposed += waited
        now[0] += 2.0  # backward
        if wire is not None:
            wire.log.exposed += 1.0
    assert own.total_ms() == pytest.approx(450 if waits else 750)
