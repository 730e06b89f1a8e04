"""The one place from which Triton kernels are launched, so that launches can be watched.

`launch` runs a kernel. Under `recording` each launch is also kept as a `Launch`; with `run=False` nothing is executed,
and the launchers (kernels/gpu/) can be driven with tensors on the meta device: so the static gate compiles
exactly what a GPU of a given architecture would be asked to run, and tests prove which kernels a step has launched.
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
    """One launch: what was asked of the GPU."""

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
    """What `recording` gives: the launches so far."""

    arch: str | None  # pretend to be this architecture
    run: bool
    launches: list[Launch] = field(default_factory=list)


_INTERPRETED = bool(triton.knobs.runtime.interpret)  # decided when the kernels are defined

_bf16_shims: list[bool] = []  # one entry for each kernels.testing.interpreter.bf16_semantics in force

# Innermost last. Global, not a context variable: PyTorch runs backward passes on GPUs in threads of its own.
_recorders: list[LaunchLog] = []


@contextlib.contextmanager
def bf16_allowed() -> Iterator[None]:
    """Let interpreted kernels work on bf16 in this context: somebody has mended the interpreter."""
    _bf16_shims.append(True)
    try:
        yield
    finally:
        _bf16_shims.pop()


@contextlib.contextmanager
def recording(*, run: bool = True, arch: str | None = None) -> Iterator[LaunchLog]:
    """Keep every launch made in this context.

    Args:
        run: False keeps launches without executing them; tensors may then be on the meta device.
        arch: choose tiles for this architecture (a key of kernels.tiles), whatever the device is.
    """
    recorder = LaunchLog(arch, run)
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)


def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
    """Launch a kernel over a one-dimensional grid; no programs, no launch.

    Raises:
        ValueError: more programs than a grid can have, or bf16 in an interpreter that was not mended for it.
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
    """Say whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return _INTERPRETED


def can_launch(tensor: Tensor) -> bool:
    """Say whether a kernel can be launched on this tensor: on a GPU, or interpreted."""
    return tensor.is_cuda or is_interpreted()


def arch_of(tensor: Tensor) -> str:
    """Name the architecture that tiles are chosen for: sm_XY, gfxNNN, or "interpreter"."""
    for recorder in _recorders:
        if recorder.arch is not None:
            return recorder.arch
    if not tensor.is_cuda:
        return "interpreter"
    return _arch_of_device(tensor.device.index)


@cache
def _arch_of_device(device: int) -> str:
    if not torch.cuda.is_available():
        return "sm_80"  # of a fake tensor: nothing is launched
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
