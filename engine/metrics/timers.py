"""Times of a step: of its phases, of attention and expert layers in the forward passes, and of this rank's own work.

On a CPU a mark reads the host's clock. On a GPU it is an event of the computing stream: nothing waits for it, and the
times of a step are read when the device has finished the step. Backward is not split.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from foreroute.engine.model.attention import RelativeAttention
from foreroute.engine.moe.feed_forward import FeedForward
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.in_flight import DeviceLog, HostLog
from foreroute.engine.tracing import span


@dataclass(slots=True)
class StepTimes:
    """Milliseconds of one step; `outside` of forward, backward and optimizer is step_ms minus these three."""

    step_ms: float = 0.0
    processor_ms: float = 0.0  # of the host's thread that trains
    plan_wait_ms: float = 0.0  # of the host
    forward_ms: float = 0.0
    attention_ms: float = 0.0  # part of forward_ms
    experts_ms: float = 0.0  # part of forward_ms
    backward_ms: float = 0.0
    optimizer_ms: float = 0.0
    exchange_exposed_ms: float = 0.0  # part of forward_ms and backward_ms
    exchange_hidden_ms: float = 0.0  # beside computation
    own_ms: float = 0.0  # part of forward_ms: not waiting for other ranks
    data_ms: float = 0.0  # of the loader's thread, beside the step
    metric_ms: float = 0.0  # of the host: collecting what metrics need

    @property
    def outside_ms(self) -> float:
        """Time of the loop itself, waiting for plans included."""
        return self.step_ms - self.forward_ms - self.backward_ms - self.optimizer_ms


class Mark(NamedTuple):
    """A moment."""

    at: Any  # seconds of the host's clock, or an event of the device
    logs: tuple[float, ...]  # where the logs of the exchanges are


_FIELDS = {name: f"{name}_ms" for name in ("forward", "backward", "optimizer", "attention", "experts")}


@dataclass(slots=True)
class TimedStep:
    """The marks of one step, and the host's times in it."""

    host: StepTimes = field(default_factory=StepTimes)
    spans: list[tuple[str, Mark, Mark]] = field(default_factory=list)  # what, begin, end
    logs: list[HostLog | DeviceLog] = field(default_factory=list)  # of the exchanges

    def times(self) -> StepTimes:
        """Return the times, once; the host waits for a device that has not finished the step.

        Own time is that of the forward passes without the waits for other ranks' rows. All ranks take equally long for
        a step, since each waits for the slowest; a slow rank has more own time. Backward and update are left out,
        because DeepSpeed's collectives in them wait, too.
        """
        found = self.host
        for name, begin, end in self.spans:
            ms = _elapsed_ms(begin, end)
            if name == "step":
                found.step_ms += ms
            elif name in _FIELDS:
                setattr(found, _FIELDS[name], getattr(found, _FIELDS[name]) + ms)
            if name == "forward":
                waits = zip(self.logs, begin.logs, end.logs, strict=True)
                found.own_ms += ms - sum(log.exposed_ms(before, after) for log, before, after in waits)
        for log in self.logs:
            taken = log.take()
            found.exchange_exposed_ms += taken.exposed_ms
            found.exchange_hidden_ms += taken.hidden_ms
        return found


class StepTimer:
    """Marks the steps of a model in training; an evaluation between two steps counts for neither.

    Args:
        model: its attention modules and its feed-forward or expert modules are timed.
        device: where it lives.
        comms: through which its layers exchange rows and its tables theirs; None for what is not shared out.
    """

    def __init__(self, model: nn.Module, device: torch.device, *comms: ExpertGroupComm | None) -> None:
        self._cuda, self._comms = device.type == "cuda", [comm for comm in comms if comm is not None]
        self._step, self._phase = TimedStep(), ""
        for name, module in model.named_modules():
            if isinstance(module, RelativeAttention):
                self._watch(module, "attention")
            elif isinstance(module, MoELayer) or (isinstance(module, FeedForward) and name.endswith(".feed_forward")):
                self._watch(module, "experts")

    @property
    def host(self) -> StepTimes:
        """Times of the host in the step under way."""
        return self._step.host

    def begin(self) -> None:
        """Begin a step."""
        self._step = TimedStep()
        self._began, self._processor_s = self._mark(), time.thread_time()

    def end(self) -> TimedStep:
        """End the step and return its marks; the device may still compute it."""
        self._step.spans.append(("step", self._began, self._mark()))
        self.host.processor_ms = 1e3 * (time.thread_time() - self._processor_s)
        self._step.logs = [comm.take_log() for comm in self._comms]
        return self._step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step, which is also a range of a trace."""
        self._phase = name
        with span(name):
            begin = self._mark()
            yield
            self._step.spans.append((name, begin, self._mark()))
        self._phase = ""

    @contextmanager
    def metrics(self) -> Iterator[None]:
        """Time code of the host that only metrics need."""
        start = time.perf_counter()
        yield
        self.host.metric_ms += 1e3 * (time.perf_counter() - start)

    def _watch(self, module: nn.Module, kind: str) -> None:
        begin: list[Mark] = []

        def timed(mark: Callable[[], None]) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if module.training and self._phase == "forward":  # with recomputation, backward runs modules again
                    mark()

            return hook

        module.register_forward_pre_hook(timed(lambda: begin.append(self._mark())))
        module.register_forward_hook(timed(lambda: self._step.spans.append((kind, begin.pop(), self._mark()))))

    def _mark(self) -> Mark:
        logs = tuple(comm.mark() for comm in self._comms)
        if not self._cuda:
            return Mark(time.perf_counter(), logs)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return Mark(event, logs)


def _elapsed_ms(begin: Mark, end: Mark) -> float:
    on_gpu = isinstance(begin.at, torch.cuda.Event)
    elapsed_ms: float = begin.at.elapsed_time(end.at) if on_gpu else 1e3 * (end.at - begin.at)
    return elapsed_ms
