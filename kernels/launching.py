"""The single place that launches Triton kernels, so that launches can be recorded.

`launch` runs a kernel. Inside `recording` each launch is also recorded as a `Launch`. With `run=False` nothing is
executed, and the launchers (kernels/gpu/) accept tensors on the meta device. So the static gate compiles exactly the
kernels that a GPU of a given architecture would run, and tests verify which kernels a step has launched.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from foreroute.kernels.tiles import Tile

MAX_ROWS = 2**31 - 2**10  # row numbers are int32, up to the end of the last tile


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel, with its arguments and options."""

    kernel: Any  # the @triton.jit function
    programs: int  # size of the one-dimensional grid
    arguments: dict[str, Any]  # by parameter name, constants included
    options: dict[str, int]  # num_warps, num_stages

    @property
    def name(self) -> str:
        """Name of the kernel function."""
        return str(self.kernel.fn.__name__)


@dataclass(slots=True, eq=False)
class LaunchLog:
    """The launches recorded so far, in order."""

    arch: str | None  # choose tiles for this architecture
    run: bool  # whether launches are executed
    launches: list[Launch] = field(default_factory=list)


_INTERPRETED = bool(triton.knobs.runtime.interpret)  # fixed when the kernels are defined

_bf16_shims: list[bool] = []  # one entry for each active kernels.testing.interpreter.bf16_semantics

# The innermost is last. Global, not a context variable: PyTorch runs backward passes on GPUs in its own threads.
_recorders: list[LaunchLog] = []


@contextlib.contextmanager
def bf16_allowed() -> Iterator[None]:
    """Allow bf16 in interpreted kernels inside this context, where the interpreter's arithmetic is corrected."""
    _bf16_shims.append(True)
    try:
        yield
    finally:
        _bf16_shims.pop()


@contextlib.contextmanager
def recording(*, run: bool = True, arch: str | None = None) -> Iterator[LaunchLog]:
    """Record every launch made in this context.

    Args:
        run: False records launches without executing them; tensors may then be on the meta device.
        arch: choose tiles for this architecture (a key of kernels.tiles) instead of the device's.
    """
    recorder = LaunchLog(arch, run)
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)


def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
    """Launch a kernel over a one-dimensional grid; an empty grid is not launched.

    Raises:
        ValueError: the grid is too large, or a tensor is bf16 in an interpreter without bf16 arithmetic.
    """
    if programs == 0:
        return
    if programs > 2**31 - 1:
        raise ValueError(f"{programs} programs: a grid has at most {2**31 - 1}")
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    for recorder in _recorders:
        recorder.launches.append(Launch(kernel, programs, dict(arguments), options))
    if not all(recorder.run for recorder in _recorders):
        return
    if _INTERPRETED and not _bf16_shims:
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
                raise ValueError(
                    f"{name.removesuffix('_ptr')} is torch.bfloat16: Triton's interpreter computes it wrongly; use fp32"
                    " or fp16, or kernels.testing.interpreter.bf16_semantics()"
                )
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **options)


def is_interpreted() -> bool:
    """Return whether Triton kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return _INTERPRETED


def arch_of(tensor: Tensor) -> str:
    """Return the name of the architecture for which tiles are chosen: sm_XY, gfxNNN, or "interpreter"."""
    for recorder in _recorders:
        if recorder.arch is not None:
            return recorder.arch
    if not tensor.is_cuda:
        return "interpreter"
    return _arch_of_device(tensor.device.index)


@cache
def _arch_of_device(device: int) -> str:
    if not torch.cuda.is_available():
        return "sm_80"  # for a fake tensor: nothing is launched
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to the device without blocking the host."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
