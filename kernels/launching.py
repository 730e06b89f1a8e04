"""The one place from which Triton kernels are launched, so that launches can be watched.

`launch` runs a kernel. Under `recording` each launch is also kept as a `Launch`; with `run=False` nothing is executed,
and operations can be driven with tensors on the meta device: so the static gate (benchmarks/kernels_static.py) compiles
exactly what a GPU of a given architecture would be asked to run, and tests prove which kernels a step has launched.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.tiles import Tile

MAX_INT32 = 2**31 - 1


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


@dataclass(slots=True)
class Recorder:
    """What `recording` gives: the launches so far."""

    arch: str | None  # pretend to be this architecture
    run: bool
    launches: list[Launch] = field(default_factory=list)


_RECORDER: ContextVar[Recorder | None] = ContextVar("kernels_recorder", default=None)


@contextlib.contextmanager
def recording(*, run: bool = True, arch: str | None = None) -> Iterator[Recorder]:
    """Keep every launch made in this context.

    Args:
        run: False keeps launches without executing them; tensors may then be on the meta device.
        arch: choose tiles for this architecture (a key of kernels.tiles), whatever the device is.
    """
    recorder = Recorder(arch, run)
    token = _RECORDER.set(recorder)
    try:
        yield recorder
    finally:
        _RECORDER.reset(token)


def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
    """Launch a kernel over a one-dimensional grid; no programs, no launch.

    Raises:
        ValueError: more programs than a grid can have.
    """
    if programs == 0:
        return
    if programs > MAX_INT32:
        raise ValueError(f"{programs} programs: a grid has at most {MAX_INT32}")
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, programs, dict(arguments), options))
        if not recorder.run:
            return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **options)


def is_interpreted() -> bool:
    """Say whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def can_launch(tensor: Tensor) -> bool:
    """Say whether a kernel can be launched on this tensor: on a GPU, interpreted, or only recorded."""
    recorder = _RECORDER.get()
    return tensor.is_cuda or is_interpreted() or (recorder is not None and not recorder.run)


def arch_of(tensor: Tensor) -> str:
    """Name the architecture that tiles are chosen for: sm_XY, gfxNNN, or "interpreter"."""
    recorder = _RECORDER.get()
    if recorder is not None and recorder.arch is not None:
        return recorder.arch
    if not tensor.is_cuda:
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(tensor.device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return f"sm_{major}{minor}"
