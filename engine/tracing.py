"""Named ranges of time, of any thread, for the trace of a few steps (engine/profiling/profiler.py starts and ends it).

`with span("dispatch"):` stands at the few places that matter. While nothing is recorded it costs 0.2 us
(record_function of PyTorch costs 5 us then). What is recorded are times of the host: on a CPU those of the work itself;
on a GPU those of its launch, and there each range is also an annotation of PyTorch's profiler, which finds the kernels
that belong to it.

Autograd runs backward passes elsewhere: `traced` calls a function as a range and makes its backward pass one, too.

The recorder is the one of the process, like PyTorch's profiler, and the one global state beside the logger: ranges lie
too deep for an argument.
"""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

P = ParamSpec("P")
T = TypeVar("T")


class Range(NamedTuple):
    """A part of a thread's time, in nanoseconds of time.perf_counter_ns."""

    name: str
    thread: str  # its name
    begin_ns: int
    end_ns: int


class InFlight(NamedTuple):
    """A collective under way, in nanoseconds of time.perf_counter_ns."""

    thread: str  # that issued it
    issued_ns: int
    arrived_ns: int


class Recorder:
    """What was recorded; threads only append to its lists."""

    def __init__(self, *, annotate: bool) -> None:
        """Record nothing yet.

        Args:
            annotate: also tell PyTorch's profiler of each range.
        """
        self.annotate = annotate
        self.ranges: list[Range] = []
        self.collectives: list[InFlight] = []


_recorder: Recorder | None = None
_nothing = nullcontext()


def record_into(recorder: Recorder | None) -> None:
    """Record from now on; None ends it. A range that is open then still goes where it began."""
    global _recorder
    _recorder = recorder


def span(name: str) -> AbstractContextManager[None]:
    """Make a range of what happens inside."""
    return _nothing if _recorder is None else _Span(name, _recorder)


def record_collective(issued: float, arrived: float) -> None:
    """Record a collective between two times of time.perf_counter; called by the thread that issued it."""
    if _recorder is not None:
        thread = threading.current_thread().name
        _recorder.collectives.append(InFlight(thread, int(1e9 * issued), int(1e9 * arrived)))


def traced(name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call the function as a range; so is its backward pass, from the gradient of its result to those of its arguments.

    Args:
        function: gives one tensor. The gradients of tensors among the positional arguments end the backward range;
            without such a gradient there is none.
    """
    if _recorder is None:
        return function(*args, **kwargs)
    with span(name):
        wanted = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.requires_grad]
        if not (wanted and torch.is_grad_enabled()):
            return function(*args, **kwargs)
        backward = _Span(name, _recorder)
        inner: list[Any] = list(args)
        for i, arg in zip(wanted, _End.apply(backward, *(args[i] for i in wanted)), strict=True):  # type: ignore[no-untyped-call]
            inner[i] = arg
        result: T = _Begin.apply(backward, function(*inner, **kwargs))  # type: ignore[no-untyped-call]
        return result


class _Span:
    """One range, to be entered and left once, by one thread."""

    __slots__ = ("_annotation", "_begin_ns", "_name", "_recorder")

    def __init__(self, name: str, recorder: Recorder) -> None:
        self._name, self._recorder = name, recorder
        self._annotation = record_function(name) if recorder.annotate else None

    def __enter__(self) -> None:
        self._begin_ns = time.perf_counter_ns()
        if self._annotation is not None:
            self._annotation.__enter__()

    def __exit__(self, *_: object) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
        thread, end_ns = threading.current_thread().name, time.perf_counter_ns()
        self._recorder.ranges.append(Range(self._name, thread, self._begin_ns, end_ns))


class _Begin(torch.autograd.Function):
    """Hands a tensor on; in backward its gradient comes first, and the range begins."""

    @staticmethod
    def forward(ctx: Any, backward: _Span, result: Tensor) -> Tensor:
        ctx.backward_span = backward
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        ctx.backward_span.__enter__()
        return None, gradient


class _End(torch.autograd.Function):
    """Hands tensors on; in backward their gradients come last, and the range ends."""

    @staticmethod
    def forward(ctx: Any, backward: _Span, *args: Tensor) -> tuple[Tensor, ...]:
        ctx.backward_span = backward
        return tuple(arg.view_as(arg) for arg in args)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.backward_span.__exit__()
        return None, *gradients
