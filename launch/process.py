"""What a process needs before training: threads, a quiet start, and a stop that waits for the end of a step."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from engine.config import require

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # options of glibc's mallopt(3)


class StopSignal:
    """Ends the program with 128 + number on SIGINT and SIGTERM: at once, or, while `deferred`, when the trainer asks.

    So a signal in the middle of a step waits for its end and a checkpoint. A second one ends the process at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self._deferred = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        """Say whether a stop was asked for."""
        return self.number != 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only take note of a signal, for whoever calls this object."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it, so that scripts see an unfinished run."""
        return 128 + self.number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)
        if not self._deferred:
            sys.exit(self.exit_code)


def set_up(threads: int) -> None:
    """Set PyTorch's CPU threads (0 leaves the default), make denormals zero, and keep freed memory."""
    require(threads >= 0, f"threads={threads}: must be at least 0")
    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Make glibc keep what is freed for the next step instead of giving it back to the system.

    Otherwise every large activation is mapped anew and its pages fault in one by one: relative attention at the
    published shapes took 223 ms with the defaults and 179 ms so (fp32, 2 cores, 2026-11). No effect without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)
