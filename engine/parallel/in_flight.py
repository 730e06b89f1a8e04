"""Asynchronous collectives, and the times that they take.

Two times are kept for all collectives of a group. Total: how long at least one was in flight, from its issue to its
completion; waiting for slower ranks is part of it. Exposed: how long the computation waited for one. The rest of the
total was hidden by computation.

On a CPU both are host times: the library's thread reports the completion, and exposed is the time blocked in `wait`.
On a GPU both are times of the device, measured by events: issue is when the rows are packed, exposed is how long the
computing stream waited. No event is read before `take`, which waits for the last one: call it at the end of a step.
"""

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from foreroute.engine.tracing import record_collective, span


class ExchangeTimes(NamedTuple):
    """Milliseconds since the last reading."""

    exposed_ms: float  # the computation waited for the exchange
    hidden_ms: float  # the exchange ran beside computation


class AsyncCollective(Protocol):
    """A collective in flight."""

    def wait(self) -> Tensor:
        """Return the result, which may be used afterwards; once only."""
        ...


class CudaStreams(NamedTuple):
    """CUDA streams beside the computing one."""

    side: torch.cuda.Stream  # rows are packed and collectives issued here
    watch: torch.cuda.Stream  # waits for one collective after the other, to mark their ends


@dataclass(slots=True)
class HostLog:
    """Times of the collectives of a CPU."""

    spans: list[tuple[float, float]] = field(default_factory=list)  # seconds: issue, completion
    exposed: float = 0.0  # seconds

    def mark(self) -> float:
        """Return the present position in the log."""
        return self.exposed

    def exposed_ms(self, begin: float, end: float) -> float:
        """Return the exposed milliseconds between two marks made since the last `take`."""
        return 1e3 * (end - begin)

    def take(self) -> ExchangeTimes:
        """Return the times since the last call, of collectives that were waited for."""
        spans, exposed_ms = self.spans, 1e3 * self.exposed
        self.spans, self.exposed = [], 0.0
        return ExchangeTimes(exposed_ms, max(0.0, 1e3 * covered(spans) - exposed_ms))


@dataclass(slots=True)
class DeviceLog:
    """Times of the collectives of a GPU, as CUDA events: issue, completion, before and after the wait for it."""

    events: list[tuple[torch.cuda.Event, ...]] = field(default_factory=list)

    def mark(self) -> int:
        """Return the present position in the log."""
        return len(self.events)

    def exposed_ms(self, begin: float, end: float) -> float:
        """Return the exposed milliseconds between two marks since the last `take`; the device must have passed both."""
        collectives = self.events[int(begin) : int(end)]
        exposed_ms: float = sum(before.elapsed_time(after) for *_, before, after in collectives)
        return exposed_ms

    def take(self) -> ExchangeTimes:
        """Return the times since the last call; waits for the device."""
        events, self.events = self.events, []
        if not events:
            return ExchangeTimes(0.0, 0.0)
        zero = events[0][0]
        for collective in events:
            for event in collective:
                event.synchronize()
        spans = [(zero.elapsed_time(issue), zero.elapsed_time(end)) for issue, end, *_ in events]
        exposed_ms = sum(before.elapsed_time(after) for *_, before, after in events)
        return ExchangeTimes(exposed_ms, max(0.0, covered(spans) - exposed_ms))


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of spans (start, end).

    Example: (0, 2), (1, 4), (6, 7) cover 5.
    """
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


class CpuCollective:
    """A collective of CPU tensors."""

    def __init__(self, work: Any, got: Tensor, log: HostLog, issued: float) -> None:
        """Use the library's handle, the tensor that will hold the result and the time of issue."""
        self.work, self.got, self.log, self.issued = work, got, log, issued
        self.done: float | None = None
        work.get_future().add_done_callback(self._land)

    def wait(self) -> Tensor:
        """Block the host until the result is there."""
        start = time.perf_counter()
        with span("exchange"):
            self.work.wait()
        end = time.perf_counter()
        self.log.exposed += end - start
        arrived = end if self.done is None else self.done
        self.log.spans.append((self.issued, arrived))
        record_collective(self.issued, arrived)
        return self.got

    def _land(self, _: Any) -> None:
        self.done = time.perf_counter()


class SummedCollective:
    """A collective that receives equally many rows from each rank and adds them up."""

    def __init__(self, collective: AsyncCollective, ranks: int) -> None:
        self.collective, self.ranks = collective, ranks

    def wait(self) -> Tensor:
        """Return the sum over the ranks."""
        got = self.collective.wait()
        with span("combine"):
            return got.view(self.ranks, -1, got.shape[1]).sum(dim=0)


class GpuCollective:
    """A collective of GPU tensors; the host never waits."""

    def __init__(
        self, work: Any, got: Tensor, rows: Tensor, log: DeviceLog, streams: CudaStreams, issue: torch.cuda.Event
    ) -> None:
        """Use the library's handle, both tensors and the event of the issue; mark the end on the watching stream."""
        self.got, self.rows, self.log, self.issue = got, rows, log, issue
        self.end = torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(streams.watch):
            work.wait()  # lets this stream wait, not the host
            self.end.record()

    def wait(self) -> Tensor:
        """Let the current stream wait for the result."""
        current = torch.cuda.current_stream()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with span("exchange"):
            before.record(current)
            current.wait_event(self.end)
            after.record(current)
        # Both were allocated on another stream: their memory may be reused only after this one has passed this point.
        self.got.record_stream(current)
        self.rows.record_stream(current)
        self.log.events.append((self.issue, self.end, before, after))
        return self.got
