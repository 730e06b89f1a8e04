"""How much of a forward pass is attention and how much is expert layers, measured where the modules are called; and how
much of it is this rank's own work.

The parts are host time: on a CPU the time of the work itself. Backward is not split.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from foreroute.engine.model.attention import RelativeAttention
from foreroute.engine.moe.feed_forward import FeedForward
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.parallel.collectives import Wire


class ForwardTimes:
    """Adds up the time spent in attention modules and in feed-forward or expert modules of a model that trains.

    An evaluation between two steps is none of a step's time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._ms = {"attention": 0.0, "experts": 0.0}
        self._start = 0.0
        for name, module in model.named_modules():
            if isinstance(module, RelativeAttention):
                self._watch(module, "attention")
            elif isinstance(module, MoELayer) or (isinstance(module, FeedForward) and name.endswith(".feed_forward")):
                self._watch(module, "experts")

    def take(self) -> tuple[float, float]:
        """Milliseconds in (attention, experts) since the last call."""
        taken = self._ms["attention"], self._ms["experts"]
        self._ms = {"attention": 0.0, "experts": 0.0}
        return taken

    def _watch(self, module: nn.Module, kind: str) -> None:
        def before(*_: Any) -> None:
            self._start = time.perf_counter()

        def after(*_: Any) -> None:
            if module.training:
                self._ms[kind] += 1e3 * (time.perf_counter() - self._start)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


class OwnTime:
    """Time of a step's forward passes without the waits for other ranks' rows: a slow rank has more of it than the
    others.

    All ranks take equally long for a step, for each waits for the slowest. Backward and update are left out:
    DeepSpeed's collectives in them wait, too. On a GPU it is time of the device.
    """

    def __init__(self, device: torch.device, wire: Wire | None) -> None:
        self._cuda, self._wire = device.type == "cuda", wire
        self._passes: list[tuple[tuple[Any, float], tuple[Any, float]]] = []  # their begins and ends

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Time a forward pass."""
        begin = self._now()
        yield
        self._passes.append((begin, self._now()))

    def total_ms(self) -> float:
        """Give the time of all passes; the device must be past them, and wire.take_times not called yet."""
        total = 0.0
        for (begin, begin_mark), (end, end_mark) in self._passes:
            total += begin.elapsed_time(end) if self._cuda else 1e3 * (end - begin)
            if self._wire is not None:
                total -= self._wire.exposed_ms(begin_mark, end_mark)
        return total

    def _now(self) -> tuple[Any, float]:
        mark = 0.0 if self._wire is None else self._wire.mark()
        if not self._cuda:
            return time.perf_counter(), mark
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event, mark
