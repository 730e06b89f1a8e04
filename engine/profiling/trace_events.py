"""Events of Chrome's trace format, which Perfetto reads: our ranges and collectives, and PyTorch's profiler events.

In a trace each rank is a process, and so is its GPU, so that files of several ranks can be merged. Its tracks are: the
ranges of the main thread; those of our other threads; collectives in flight, on as many tracks as ran at one time;
PyTorch's operators, one track for each thread.

Format: "Trace Event Format" (Chromium project); ts and dur are microseconds.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreroute.engine.profiling.trace_summary import MAIN, Nested
from foreroute.engine.tracing import InFlight

Event = dict[str, Any]
_OUR_TID = 10_000_000
"""The first number of our tracks: above every thread's number, which Linux keeps below 2**22."""
_NAMES = {MAIN: "ranges"}


@dataclass(frozen=True, slots=True)
class Clock:
    """Converts this rank's times to times of the trace, which are rank 0's."""

    wall_ns: int  # to add to time.perf_counter_ns for the time of day
    shift_ns: int  # to add to this rank's time of day for rank 0's
    unsure_ns: int  # the largest error of the shift; 0 if no difference was found
    origin_ns: int  # rank 0's time of day at which the trace's time is 0

    def us(self, perf_ns: int) -> float:
        """Convert a time of time.perf_counter_ns to microseconds of the trace."""
        return (perf_ns + self.wall_ns + self.shift_ns - self.origin_ns) / 1e3


@dataclass(frozen=True, slots=True)
class Process:
    """The numbers of a rank and its GPU in the trace."""

    rank: int
    world: int

    @property
    def gpu(self) -> int:
        """The number of the GPU."""
        return self.world + self.rank


def range_events(nested: Sequence[Nested], process: Process, clock: Clock) -> list[Event]:
    """Return an event for each range, and names for the rank and the tracks."""
    tracks = sorted({part.track for part in nested}, key=lambda track: (track != MAIN, track))
    number = {track: _OUR_TID + i for i, track in enumerate(tracks)}
    found = [
        _complete(part.name, "range", process.rank, number[part.track], clock.us(part.begin_ns), clock.us(part.end_ns))
        | {"args": {"path": part.path, "own_ms": part.own_ns / 1e6}}
        for part in nested
    ]
    found += _named("process", process.rank, 0, f"rank {process.rank} (host)", 2 * process.rank)
    for track, tid in number.items():
        found += _named("thread", process.rank, tid, _NAMES.get(track, track), tid - _OUR_TID)
    return found


def collective_events(
    flights: Sequence[InFlight], issued_in: Sequence[str], process: Process, clock: Clock
) -> list[Event]:
    """Return an event for each collective, from its issue to its arrival, named after the range that issued it.

    Args:
        issued_in: the paths of these ranges.
    """
    found: list[Event] = []
    free_ns: list[int] = []  # when each track is free again
    first = _OUR_TID + 1000
    for flight, path in sorted(zip(flights, issued_in, strict=True), key=lambda f: f[0].issued_ns):
        lane = next((i for i, end in enumerate(free_ns) if end <= flight.issued_ns), len(free_ns))
        free_ns[lane : lane + 1] = [flight.arrived_ns]
        begin, end = clock.us(flight.issued_ns), clock.us(flight.arrived_ns)
        event = _complete(path.rpartition("/")[2], "flight", process.rank, first + lane, begin, end)
        found.append(event | {"args": {"issued_in": path}})
    for lane in range(len(free_ns)):
        found += _named("thread", process.rank, first + lane, f"in flight {lane + 1}", 500 + lane)
    return found


def torch_events(trace: Mapping[str, Any], process: Process, clock: Clock, ours: set[str]) -> list[Event]:
    """Convert the events of PyTorch's profiler in this process to events of the rank and its GPU.

    Args:
        trace: the content of the file from export_chrome_trace.
        ours: names of our ranges; their annotations on the host are dropped, as the ranges are already in the trace.
    """
    shift_us = (trace["baseTimeNanoseconds"] + clock.shift_ns - clock.origin_ns) / 1e3
    found: list[Event] = []
    tracks: set[tuple[bool, int]] = set()
    for event in trace["traceEvents"]:
        if event["ph"] == "M" or not isinstance(event["pid"], int):
            continue  # names, and marks of the profiler itself
        host = event["pid"] == os.getpid()  # else the number of a GPU
        if host and event.get("cat") == "user_annotation" and event["name"] in ours:
            continue
        tracks.add((host, event["tid"]))
        event |= {"pid": process.rank if host else process.gpu, "ts": event["ts"] + shift_us}
        if "id" in event:  # of an arrow between two events
            event["id"] = event["id"] * process.world + process.rank
        found.append(event)
    if any(not host for host, _ in tracks):
        found += _named("process", process.gpu, 0, f"rank {process.rank} (GPU)", 2 * process.rank + 1)
    for host, tid in tracks:
        pid = process.rank if host else process.gpu
        main = tid == os.getpid()  # so Linux numbers a process's main thread
        name = "operators" if main else f"thread {tid}" if host else f"stream {tid}"
        found += _named("thread", pid, tid, name, 1000 if main else 1001 + tid)
    return found


def _complete(name: str, kind: str, pid: int, tid: int, begin_us: float, end_us: float) -> Event:
    return {"ph": "X", "name": name, "cat": kind, "pid": pid, "tid": tid, "ts": begin_us, "dur": end_us - begin_us}


def _named(what: str, pid: int, tid: int, name: str, place: int) -> list[Event]:
    """Return events that set the name and the position of a process or thread."""
    return [
        {"ph": "M", "name": f"{what}_name", "pid": pid, "tid": tid, "args": {"name": name}},
        {"ph": "M", "name": f"{what}_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": place}},
    ]
