"""Named ranges of time, of any thread, for the trace of a few steps (engine/profiling/profiler.py starts and ends it).

`with span("dispatch"):` marks the few places that matter. Without a recording it costs 0.2 us (PyTorch's
record_function then costs 5 us). The recorded times are times of the host. On a CPU they are those of the work itself.
On a GPU they are those of its launch; there each range is also an annotation of PyTorch's profiler, which finds the
kernels that belong to it.

Autograd runs backward passes elsewhere: `traced` calls a function as a range and also makes its backward pass a range.

The recorder belongs to the process, like PyTorch's profiler. It is the only global state besides the logger: ranges are
too deep in the code for an argument.
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
    """An interval of a thread's time, in nanoseconds of time.perf_counter_ns."""

    name: str
    thread: str  # its name
    begin_ns: int
    end_ns: int


class InFlight(NamedTuple):
    """A collective in flight, in nanoseconds of time.perf_counter_ns."""

    thread: str  # that issued it
    issued_ns: int
    arrived_ns: int


class Recorder:
    """A recording; threads only append to its lists."""

    def __init__(self, *, annotate: bool) -> None:
        """Set up an empty recording.

        Args:
            annotate: also annotate each range in PyTorch's profiler.
        """
        self.annotate = annotate
        self.ranges: list[Range] = []
        self.collectives: list[InFlight] = []


_recorder: Recorder | None = None
_nothing = nullcontext()


def record_into(recorder: Recorder | None) -> None:
    """Start a recording; None ends it. An open range is still added to the recording in which it began."""
    global _recorder
    _recorder = recorder


def span(name: str) -> AbstractContextManager[None]:
    """Record the time inside the context as a range."""
    return _nothing if _recorder is None else _Span(name, _recorder)


def record_collective(issued: float, arrived: float) -> None:
    """Record a collective between two times of time.perf_counter; the thread that issued it calls this."""
    if _recorder is not None:
        thread = threading.current_thread().name
        _recorder.collectives.append(InFlight(thread, int(1e9 * issued), int(1e9 * arrived)))


def traced(name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function as a range, and make its backward pass a range.

    The backward range is from the gradient of the result to those of the arguments.

    Args:
        function: returns one tensor. The gradients of tensors among the positional arguments end the backward range;
            without such a gradient there is no backward range.
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
    """One range, entered and left once, by one thread."""

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
    """Returns its tensor; its backward runs first and begins the range."""

    @staticmethod
    def forward(ctx: Any, backward: _Span, result: Tensor) -> Tensor:
        ctx.backward_span = backward
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        ctx.backward_span.__enter__()
        return None, gradient


class _End(torch.autograd.Function):
    """Returns its tensors; its backward runs last and ends the range."""

    @staticmethod
    def forward(ctx: Any, backward: _Span, *args: Tensor) -> tuple[Tensor, ...]:
        ctx.backward_span = backward
        return tuple(arg.view_as(arg) for arg in args)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.backward_span.__exit__()
        return None, *gradients
