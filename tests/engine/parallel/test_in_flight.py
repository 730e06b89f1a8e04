"""The times of flights with a clock that the test sets; what a comm counts, against a module that records its calls."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from foreroute.engine.parallel import in_flight as flights
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.in_flight import CpuCollective, DeviceLog, HostLog, covered


def test_covered_is_the_length_of_the_union():
    assert covered([(0, 2), (1, 4), (6, 7)]) == 5  # the docstring's
    assert covered([]) == 0
    assert covered([(6, 7), (0, 9), (1, 2)]) == 9
    assert covered([(0, 1), (1, 2), (2, 2)]) == 2


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Work:
    """A collective that ends when the test says so, or when it is waited for, at a time of its own."""

    def __init__(self, clock, end):
        self.clock, self.end, self.future = clock, end, torch.futures.Future()

    def get_future(self):
        return self.future

    def land(self):
        self.clock.now = self.end
        self.future.set_result(None)

    def wait(self):
        if not self.future.done():
            self.land()


def test_exposed_is_blocked_time_and_hidden_the_rest(monkeypatch):
    clock, log = Clock(), HostLog()
    monkeypatch.setattr(flights, "time", clock)
    result = torch.zeros(1)
    first = CpuCollective(Work(clock, end=4.0), result, log, issued=1.0)
    first.work.land()  # behind computation: nobody waits for it
    clock.now = 5.0
    assert first.wait() is result
    second = CpuCollective(Work(clock, end=9.0), result, log, issued=6.0)
    third = CpuCollective(Work(clock, end=11.0), result, log, issued=7.0)
    clock.now = 8.0
    second.wait()  # blocked from 8 to 9
    third.wait()  # blocked from 9 to 11
    times = log.take()
    assert times.exposed_ms == pytest.approx(3000)
    assert times.hidden_ms == pytest.approx(3000 + 2000)  # 1 to 4, and 6 to 8
    assert log.take() == (0, 0)


class Recorder:
    """The collectives of torch.distributed, without ranks: keeps the arguments."""

    def __init__(self):
        self.calls = []

    def get_rank(self, group):
        return 1

    def get_world_size(self, group):
        return 3

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            done = torch.futures.Future()
            done.set_result(None)
            return type("Work", (), {"get_future": lambda _: done, "wait": lambda _: None})()

        return call


def test_a_wire_counts_what_leaves_and_calls_the_module_it_was_given():
    ops = Recorder()
    comm = ExpertGroupComm("group", ops)
    rows = torch.ones(6, 5, dtype=torch.bfloat16)
    assert comm.all_to_all(rows, (1, 2, 3), (4, 2, 0)).wait().shape == (6, 5)
    assert (comm.collectives, comm.sent_bytes) == (1, (1 + 3) * 5 * 2)
    name, arguments, options = ops.calls[0]
    assert name == "all_to_all_single" and arguments[1] is rows and arguments[2:] == ([4, 2, 0], [1, 2, 3])
    assert options == {"group": "group", "async_op": True}
    before = comm.sent_bytes
    assert comm.all_gather(rows).wait().shape == (18, 5)
    assert comm.sent_bytes - before == 2 * 6 * 5 * 2
    before = comm.sent_bytes
    assert comm.reduce_scatter(rows).wait().shape == (2, 5)
    assert comm.sent_bytes - before == 2 * 2 * 5 * 2
    before = comm.sent_bytes
    assert torch.equal(comm.all_reduce(torch.arange(9)), torch.arange(9))
    assert comm.sent_bytes - before == 2 * 2 * 9 * 8 // 3
    assert comm.collectives == len(ops.calls) == 4
    # by destination; the ring goes on to rank 2
    assert comm.sent_bytes_P == [(1 + 6 + 2) * 10, 0, (3 + 6 + 2) * 10 + 96]


def test_evaluation_is_not_timed():
    comm, rows = ExpertGroupComm("group", Recorder()), torch.ones(3, 5)
    with torch.inference_mode():
        comm.all_gather(rows).wait()
    assert comm.take_times() == (0, 0) and comm.collectives == 1
    comm.all_gather(rows).wait()
    assert sum(comm.take_times()) > 0


class Event:
    """A CUDA event of a device whose clock says `at` milliseconds."""

    def __init__(self, at):
        self.at, self.waited = at, False

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, later):
        return later.at - self.at


def test_times_of_a_device_are_those_between_its_events():
    """Each flight: issue, completion, before and after the wait for it."""
    log = DeviceLog()
    assert log.take() == (0, 0)
    for times in ((1.0, 4.0, 5.0, 5.0), (6.0, 9.0, 8.0, 9.0), (7.0, 12.0, 9.5, 12.0)):
        log.events.append(tuple(map(Event, times)))
    begin, end = 1, log.mark()
    assert end == 3 and log.exposed_ms(begin, end) == 1.0 + 2.5 and log.exposed_ms(0, 1) == 0
    events = [event for flight in log.events for event in flight]
    times = log.take()
    assert all(event.waited for event in events)
    assert times.exposed_ms == 3.5
    assert times.hidden_ms == (3.0 + 6.0) - 3.5  # under way from 1 to 4 and from 6 to 12
    assert log.take() == (0, 0) and log.mark() == 0
    log.events.append(tuple(map(Event, (3.0, 4.0, 2.0, 6.0))))  # waited for longer than it flew
    assert log.take() == (4.0, 0.0)


class Stream:
    """A CUDA stream that keeps what it is told."""

    def __init__(self, name, device):
        self.name, self.device = name, device

    def wait_event(self, event):
        self.device.told.append((self.name, "waits for", event))


class Device:
    """What GpuCollective needs of torch.cuda: events, streams, the current one."""

    def __init__(self, monkeypatch):
        self.told, self.events = [], []
        self.current = Stream("compute", self)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)

    def event(self, *, enable_timing):
        assert enable_timing
        self.events.append(SimpleNamespace(record=self.record))
        return self.events[-1]

    def record(self, stream=None):
        self.told.append(((stream or self.current).name, "is here", None))

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


def test_a_flight_of_a_gpu_lets_streams_wait_and_not_the_host(monkeypatch):
    device, log = Device(monkeypatch), DeviceLog()
    used = []
    got, rows = (SimpleNamespace(record_stream=lambda s, n=n: used.append((n, s.name))) for n in ("got", "rows"))
    work = SimpleNamespace(wait=lambda: device.told.append((device.current.name, "waits for", "the rows")))
    streams = flights.CudaStreams(Stream("side", device), Stream("watch", device))
    flight = flights.GpuCollective(work, got, rows, log, streams, issue="issue")
    assert device.told == [("watch", "waits for", "the rows"), ("watch", "is here", None)]
    device.told.clear()
    assert flight.wait() is got
    end, before, after = device.events
    assert device.told == [("compute", "is here", None), ("compute", "waits for", end), ("compute", "is here", None)]
    assert log.events == [("issue", end, before, after)]
    assert sorted(used) == [("got", "compute"), ("rows", "compute")]  # their memory stays until then
