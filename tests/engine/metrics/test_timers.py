"""What counts as a step's time in each phase, in attention and experts, and as a rank's own."""

import time

import pytest
import torch
from torch import nn

from foreroute.engine.metrics.timers import StepTimer, TimedStep
from foreroute.engine.model.build import build_model
from foreroute.engine.parallel.in_flight import HostLog
from foreroute.engine.routing.plan import Routing
from foreroute.engine.testing.tiny_run import SEGMENT, STREAMS, SYMBOLS, tiny_config

CPU = torch.device("cpu")


def test_times_are_of_the_forward_passes_of_training_alone():
    config = tiny_config()
    config.moe.router = "frozen"
    model = build_model(config, SYMBOLS)
    timer = StepTimer(model, CPU)
    ids_BQ = torch.zeros(STREAMS, SEGMENT, dtype=torch.int64)

    def run(phase, *, training=True):
        timer.begin()
        model.train(training)
        with timer.phase(phase):
            model(ids_BQ, ids_BQ, None, Routing(config.schedule.k_max))
        return timer.end().times()

    first = run("forward")
    assert 0 < first.attention_ms + first.experts_ms < first.forward_ms < first.step_ms
    assert min(first.attention_ms, first.experts_ms) > 0 and first.own_ms == first.forward_ms
    again = run("backward")  # recomputation
    assert again.backward_ms > 0 and again.attention_ms == again.experts_ms == again.forward_ms == 0
    evaluated = run("forward", training=False)
    assert evaluated.attention_ms == evaluated.experts_ms == 0
    assert min(run("forward").attention_ms, run("forward").experts_ms) > 0


class ExpertGroupComm:
    def __init__(self):
        self.log = HostLog()

    def mark(self):
        return self.log.mark()

    def take_log(self):
        log, self.log = self.log, HostLog()
        return log


@pytest.mark.parametrize("waits", [True, False])
def test_a_step_by_a_clock_of_the_test(monkeypatch, waits):
    """Two micro-batches, and what other ranks' rows were waited for in forward and backward; a second step is new."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    comm = ExpertGroupComm() if waits else None
    timer = StepTimer(nn.Identity(), CPU, comm)

    def spend(seconds, waited):
        now[0] += seconds
        if comm is not None:
            comm.log.exposed += waited

    for scale in (1.0, 2.0):
        timer.begin()
        for forward, waited in ((0.5, 0.2), (0.25, 0.1)):
            with timer.phase("forward"):
                spend(scale * forward, waited)
            with timer.phase("backward"):
                spend(scale * 2.0, 1.0)
        with timer.metrics():
            spend(0.03, 0.0)
        with timer.phase("totals"):
            spend(0.01, 0.0)
        with timer.phase("optimizer"):
            spend(0.04, 0.0)
        step = timer.end()
        now[0] += 100.0  # until it is read
        times = step.times()
        assert times.forward_ms == pytest.approx(750 * scale) and times.backward_ms == pytest.approx(4000 * scale)
        assert times.optimizer_ms == pytest.approx(40) and times.metric_ms == pytest.approx(30)
        assert times.outside_ms == pytest.approx(40) and times.step_ms == pytest.approx(4750 * scale + 80)
        assert times.own_ms == pytest.approx(750 * scale - 300 * waits)
        assert times.exchange_exposed_ms == pytest.approx(2300 * waits)


def test_processor_time_is_without_waits():
    timer = StepTimer(nn.Identity(), CPU)
    timer.begin()
    time.sleep(0.05)
    begun = time.thread_time()
    while time.thread_time() < begun + 0.02:
        pass
    times = timer.end().times()
    assert 20 <= times.processor_ms <= times.step_ms - 45


class Device:
    """A device whose clock the host may not read: events are recorded now and happen when the device gets there."""

    def __init__(self):
        self.queue, self.now = [], 0.0

    def work(self, ms):
        self.queue.append(ms)

    def catch_up(self):
        for item in self.queue:
            if isinstance(item, float):
                self.now += item
            else:
                item.happened = self.now
        self.queue = []


def test_times_of_a_gpu_are_of_the_device_and_read_when_it_is_past_the_step(monkeypatch):
    device = Device()

    class Event:
        happened = None

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=None):
            device.queue.append(self)

        def elapsed_time(self, end):
            assert None not in (self.happened, end.happened), "the device is not there yet"
            return end.happened - self.happened

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = StepTimer(nn.Identity(), torch.device("cuda"))
    steps = []
    for forward in (30.0, 40.0):  # both steps are launched before the first one is read
        timer.begin()
        with timer.phase("forward"):
            device.work(forward)
        with timer.phase("backward"):
            device.work(2 * forward)
        device.work(5.0)
        with timer.phase("optimizer"):
            device.work(7.0)
        steps.append(timer.end())
    with pytest.raises(AssertionError, match="not there yet"):  # the control: a time that is read at once
        TimedStep(spans=steps[0].spans).times()
    device.catch_up()
    first, second = (step.times() for step in steps)
    assert (first.forward_ms, first.backward_ms, first.optimizer_ms) == (30, 60, 7)
    assert (second.forward_ms, second.backward_ms, second.optimizer_ms) == (40, 80, 7)
    assert (second.step_ms, second.outside_ms, second.own_ms) == (132, 5, 40)
