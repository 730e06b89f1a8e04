"""Checks around Triton's interpreter (TRITON_INTERPRET=1) for kernel tests.

`guarded` detects accesses outside a launch's tensors and write races, and records the bytes that were accessed.
`bf16_semantics` corrects bf16 arithmetic. `poisoned_empty` reveals memory that a kernel did not write. Nothing is
changed until one of them is entered, except for a defect of Triton 3.6 that is corrected on import. The interpreter
runs one program after another, in grid order: it does not show tf32 rounding, asynchronous copies, or effects of the
number of warps and of the order of programs.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter

from foreroute.kernels.launching import bf16_allowed

if triton.__version__.startswith("3.6."):
    # Its range(tensor, tensor) converts an array of shape [1] to a Python int, which newer NumPy refuses.
    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_with_index


class GuardError(RuntimeError):
    """A kernel accessed memory outside its arguments, or stored one address twice."""


@dataclass(frozen=True, slots=True)
class Touched:
    """The accesses of one launch to one tensor argument; an atomic counts as a read and as a write."""

    read_bytes_distinct: int  # bytes that an active lane addressed
    read_bytes_total: int  # active lanes x bytes per lane, summed over all programs
    written_bytes_distinct: int
    written_bytes_total: int


@dataclass(frozen=True, slots=True)
class TouchedLaunch:
    """One launch that completed."""

    name: str  # of the kernel function
    grid: tuple[int, ...]  # always three numbers
    touched: dict[str, Touched]  # by parameter name; "name[i]" for a tensor in a tuple


@dataclass(slots=True)
class Guard:
    """The launches recorded by `guarded` so far."""

    launches: list[TouchedLaunch] = field(default_factory=list)


class _View:
    """One tensor argument of one launch: the addresses of its elements, and the bytes that were accessed."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self.start = tensor.data_ptr()
        size = tensor.element_size()
        strides = [stride * size for stride in tensor.stride()]
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
        self.num_bytes = last + size if tensor.numel() else 0
        self.read, self.written = np.zeros((2, self.num_bytes), bool)
        self.storer = np.zeros(self.num_bytes, np.int32)  # 1 + number of the program; 0: none
        self.read_total = self.written_total = 0
        self.elements: NDArray[np.bool_] | None = None  # which bytes belong to the view; None: all
        if self.num_bytes and not tensor.is_contiguous():
            self.elements = np.zeros(self.num_bytes, bool)
            as_strided = np.lib.stride_tricks.as_strided
            as_strided(self.elements, (*tensor.shape, size), (*strides, 1))[...] = True

    def holds(self, address: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
        """Return which lanes, `width` bytes from each address, are inside the view."""
        offset = address - self.start
        inside = (offset >= 0) & (offset <= self.num_bytes - width)
        if self.elements is not None:
            first = offset[inside]
            inside[inside] = self.elements[first] & self.elements[first + width - 1]
        return inside

    def touched(self) -> Touched:
        """Return the totals."""
        read, written = np.count_nonzero(self.read), np.count_nonzero(self.written)
        return Touched(int(read), self.read_total, int(written), self.written_total)


class _Running:
    """The running launch: checks and counts each access."""

    def __init__(self, name: str, views: list[_View], races: bool) -> None:
        self.name, self.views, self.races = name, views, races
        self.fault: GuardError | None = None  # kept here, as upstream wraps exceptions in its own

    def access(self, kind: str, pointers: Any, mask: Any, width: int) -> None:
        """Account for one load, store or atomic of a program."""
        active = np.broadcast_to(np.asarray(mask, bool), pointers.shape)
        address = pointers[active].astype(np.int64)
        for view in self.views:
            if not address.size:
                return
            inside = view.holds(address, width)
            if inside.any():
                self._touch(kind, view, address[inside] - view.start, width)
                address = address[~inside]
        if address.size:
            self._fail_outside(kind, address, active.sum(), width)

    def _touch(self, kind: str, view: _View, offset: NDArray[np.int64], width: int) -> None:
        spread = (offset[:, None] + np.arange(width)).ravel()
        if kind != "store":
            view.read[spread] = True
            view.read_total += spread.size
        if kind != "load":
            view.written[spread] = True
            view.written_total += spread.size
        if kind == "store" and self.races:
            self._check_race(view, spread)

    def _check_race(self, view: _View, spread: NDArray[np.int64]) -> None:
        grid = interpreter.interpreter_builder.grid_dim
        me = 1 + np.ravel_multi_index(interpreter.interpreter_builder.grid_idx, grid)
        before = view.storer[spread]
        others = before[(before != 0) & (before != me)]
        if others.size:
            other = tuple(int(i) for i in np.unravel_index(others[0] - 1, grid))
            self._fail(f"stores bytes of {view.name} that program {other} has stored: a race")
        lane = np.arange(spread.size, dtype=np.int32)
        view.storer[spread] = lane
        if (view.storer[spread] != lane).any():
            self._fail(f"stores the same bytes of {view.name} from two lanes: a race")
        view.storer[spread] = me

    def _fail_outside(self, kind: str, address: Any, lanes: int, width: int) -> None:
        where = "the launch has no tensor with elements"
        first = int(address[0])
        views = [view for view in self.views if view.num_bytes]
        if views:
            # The nearest view, before or after.
            near = min(views, key=lambda v: max(v.start - first, first + width - v.start - v.num_bytes))
            where = f"the first at byte {first - near.start} of {near.name}, a view of {near.num_bytes}"
        self._fail(f"{kind} outside every argument in {address.size} of {lanes} lanes: {where}")

    def _fail(self, what: str) -> None:
        program = tuple(interpreter.interpreter_builder.grid_idx)
        self.fault = GuardError(f"{self.name}, program {program}: {what}")
        raise self.fault


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a kernel argument: itself, a descriptor's base, or a tuple's items."""
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _tensors(f"{name}[{i}]", part)
    elif isinstance(value, interpreter.TensorDescriptor):
        yield from _tensors(name, value.base)
    elif hasattr(value, "data_ptr"):
        yield name, interpreter._unwrap_tensor(value)


def _require_interpreter() -> None:
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before kernels are imported: this patches the interpreter")


def _watched_memory(access: Callable[[str, Any, Any, int], None]) -> SimpleNamespace:
    """Wrap the four functions through which the interpreter touches memory."""
    memory = interpreter._interpreter

    def load(pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        access("load", pointers, mask, dtype.itemsize)
        return memory.load(pointers, mask, other, dtype)

    def store(pointers: Any, value: Any, mask: Any) -> Any:
        access("store", pointers, mask, value.itemsize)
        return memory.store(pointers, value, mask)

    def atomic_rmw(operation: Any, pointers: Any, value: Any, mask: Any, order: Any) -> Any:
        access("atomic", pointers, mask, value.itemsize)
        return memory.atomic_rmw(operation, pointers, value, mask, order)

    def atomic_cas(pointers: Any, compare: Any, value: Any, order: Any) -> Any:
        access("atomic", pointers, True, value.itemsize)
        return memory.atomic_cas(pointers, compare, value, order)

    return SimpleNamespace(load=load, store=store, atomic_rmw=atomic_rmw, atomic_cas=atomic_cas)


@contextlib.contextmanager
def guarded(*, races: bool = True) -> Iterator[Guard]:
    """Check and record every access of the interpreted launches in this context.

    An active lane must address elements of one of the launch's tensor arguments, not memory before or after the view
    nor gaps between its strides. If arguments share elements, an access is attributed to the first. The launch raises
    GuardError at its first fault and is then not recorded. Reads of another program's stores, and stores to another
    program's atomics, are not detected. As on a GPU, and unlike upstream's interpreter, tl.maximum and tl.minimum
    prefer a number to NaN.

    Args:
        races: also refuse plain stores of one byte by two programs, or by two lanes of one store.
    """
    _require_interpreter()
    guard, executor = Guard(), interpreter.GridExecutor
    prepare, call = executor._init_args_hst, executor.__call__
    builder = interpreter.InterpreterBuilder
    running = _Running("", [], races)

    def prepare_and_note(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal running
        host_args, host_kwargs = prepare(self, args, kwargs)
        given = dict(zip(self.arg_names, host_args, strict=False)) | host_kwargs
        ordered = [(name, given[name]) for name in self.arg_names if name in given]
        views = [_View(*named) for argument in ordered for named in _tensors(*argument)]
        running = _Running(self.fn.__name__, views, races)
        return host_args, host_kwargs

    def call_and_record(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(self, *args, **kwargs)
        except interpreter.InterpreterError:
            if running.fault is not None:
                raise running.fault from None
            raise
        touched = {view.name: view.touched() for view in running.views}
        grid = tuple(interpreter.interpreter_builder.grid_dim)
        guard.launches.append(TouchedLaunch(running.name, grid, touched))

    memory = _watched_memory(lambda *what: running.access(*what))
    with (
        patch.object(interpreter, "_interpreter", memory),
        patch.object(executor, "_init_args_hst", prepare_and_note),
        patch.object(executor, "__call__", call_and_record),
        patch.object(builder, "create_maxnumf", lambda self, a, b: self.binary_op(a, b, np.fmax)),
        patch.object(builder, "create_minnumf", lambda self, a, b: self.binary_op(a, b, np.fmin)),
    ):
        yield guard


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widen(handle: Any) -> Any:
    """Return a bf16 handle's values in fp32, exactly; any other handle unchanged."""
    if not _is_bf16(handle):
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(values: Any) -> Any:
    """Round numbers of any dtype to a bf16 handle, once, to nearest even."""
    exact = np.asarray(values)
    with np.errstate(over="ignore"):
        wide = exact.astype(np.float32)
    bits = wide.view(np.uint32)
    if exact.dtype not in (np.float32, np.float16):
        # Step 1 of 2 rounds to odd: towards zero, then the last bit set if anything was lost.
        exact = exact.astype(np.float64)
        bits = (bits - (np.abs(wide) > np.abs(exact))) | (wide != exact)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    data = np.where(np.isnan(wide), 0x7FC0, rounded).astype(np.uint16)
    return interpreter.TensorHandle(data, tl.bfloat16)


class _Bf16:
    """The operations of the interpreter's builder that upstream runs on bf16's bits."""

    def __init__(self, builder: Any) -> None:
        self._dot, self._cast = builder.create_dot, builder.cast_impl
        self._binary, self._fma = builder.binary_op, builder.create_fma
        self._negate: Any = getattr(builder, "create_fneg", None)

    def create_dot(self, a: Any, b: Any, *rest: Any) -> Any:
        return self._dot(_widen(a), _widen(b), *rest)

    def cast_impl(self, source: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16:
            return _round(_widen(source).data)
        return self._cast(_widen(source), to)

    def binary_op(self, x: Any, y: Any, operation: Any) -> Any:
        if not _is_bf16(x):
            return self._binary(x, y, operation)
        result = operation(_widen(x).data, _widen(y).data)
        return interpreter.TensorHandle(result, tl.int1) if result.dtype == bool else _round(result)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        if not _is_bf16(z):
            return self._fma(x, y, z)
        return _round(_widen(x).data.astype(np.float64) * _widen(y).data + _widen(z).data)

    def create_fneg(self, x: Any) -> Any:  # Triton 3.8's; before, negation is 0 - x
        return _round(-_widen(x).data) if _is_bf16(x) else self._negate(x)

    def get_bf16(self, value: float) -> Any:  # triton 3.7.1 has none: a bf16 tensor x a Python number
        return _round([value])


@contextlib.contextmanager
def bf16_semantics() -> Iterator[None]:
    """Correct the interpreter's bf16 arithmetic; upstream computes on the bits, and truncates in casts.

    Covers dot (summed in fp32), casts (to nearest even), negation, abs, binary operations and comparisons, fma, bf16 x
    Python number, where; and the operations that Triton itself widens: maximum, minimum, tl.max, tl.min, tl.cumsum,
    division. (Triton refuses bf16 in other functions, exp to floor.) Does not cover tl.sum over a bf16 tensor, which
    raises NotImplementedError here (widen first); bf16 atomics, which upstream refuses; casts with rounding to zero;
    fp8; dot_scaled. The limits named in the module's docstring remain.
    """
    _require_interpreter()
    builder, reduce_sum = interpreter.interpreter_builder, interpreter.ReduceOps.sum
    names = ("create_dot", "cast_impl", "binary_op", "create_fma", "create_fneg", "get_bf16")
    bf16 = _Bf16(builder)

    def sum_of_values(self: Any, x: Any) -> Any:
        if _is_bf16(x.handle):
            raise NotImplementedError("tl.sum over bf16 in the interpreter: widen with .to(tl.float32) first")
        return reduce_sum(self, x)

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(builder, name, getattr(bf16, name), create=True))
        stack.enter_context(patch.object(interpreter.ReduceOps, "sum", sum_of_values))
        stack.enter_context(bf16_allowed())
        yield


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        value: float = int.from_bytes(b"\x55" * tensor.element_size(), "big")  # two thirds of a signed maximum
        if tensor.is_floating_point() or tensor.is_complex():
            value = float("nan")
        with torch.no_grad():
            return tensor.fill_(value)

    return made


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill tensors from torch.empty and its variants with NaN, True, or for integers 0x55 in every byte.

    Covers torch.empty, empty_like, empty_strided, Tensor.new_empty and Tensor.new_empty_strided, looked up in Python
    while this is active.
    """
    plain, methods = ("empty", "empty_like", "empty_strided"), ("new_empty", "new_empty_strided")
    with contextlib.ExitStack() as stack:
        for owner, names in ((torch, plain), (Tensor, methods)):
            for name in names:
                stack.enter_context(patch.object(owner, name, _poisoned(getattr(owner, name))))
        yield
