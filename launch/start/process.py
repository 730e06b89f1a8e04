"""Signals, threads and memory of a process, and its end."""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch
from torch import distributed as dist

from foreroute.engine.errors import require

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # options of glibc's mallopt(3)
GRACE_S = 3.0
"""Seconds after a signal in which further signals count as repetitions of it."""

MEETING = "foreroute-meeting"
"""Name of the thread in which a rank meets the others (launch/start/meeting.py)."""
_MOST_THREADS = 4096  # beyond any machine; far more end the process without a word


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that would end the process and can be caught."""


def catchable_stops() -> list[signal.Signals]:
    """Return STOPS, without SIGHUP where it is ignored (nohup)."""
    kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOPS if not (kept and number == signal.SIGHUP)]


class StopSignal:
    """Ends the program with 128 + number on each signal of STOPS: at once, or, while `deferred`, when the trainer asks.

    So after a signal in the middle of a step the step ends and a checkpoint is written. Another signal ends the process
    at once, unless it comes within GRACE_S: a scheduler signals every process, and a launcher passes signals on.
    SIGUSR1 counts as SIGTERM: mpirun passes it on and waits, while its own end on SIGTERM leaves the ranks a second.
    SIGHUP stays ignored where it is (nohup).
    """

    def __init__(self) -> None:
        self.number = 0
        self._deferred = False
        self._since = 0.0
        for number in catchable_stops():
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        """Return whether a stop was requested."""
        return self.number != 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record a signal, for callers of this object.

        It stays so after an error: launchers send a signal as soon as a rank is gone, and the others have yet to name
        it.
        """
        self._deferred = True
        yield
        self._deferred = False

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it, so that scripts see an unfinished run."""
        return 128 + self.number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number == 0:
            self.number = signal.SIGTERM if number == signal.SIGUSR1 else number
            self._since = time.monotonic()
            if not self._deferred:
                sys.exit(self.exit_code)
        elif time.monotonic() - self._since > GRACE_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Run a program in the block; if it made a process group, end the process without the interpreter's shutdown.

    During that shutdown a thread of gloo that releases a tensor needs the interpreter and would abort the process
    ("terminate called without an active exception": torch 2.13, busy cores). The threads cannot be ended before:
    PyTorch and DeepSpeed keep the groups, so destroy_process_group leaves them running. An exception, and under MPI a
    failure, ends as usual.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        mpi = "mpi4py.MPI" in sys.modules  # whose runner ends the other ranks when one fails
        if not _leaves_at_once() or not isinstance(end.code, int | None) or (end.code and mpi):
            raise
        code = end.code or 0
    if not _leaves_at_once():
        return
    atexit._run_exitfuncs()  # what the interpreter would do first; there is no public call for it
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        MPI.Finalize()  # mpirun takes a rank without it for lost
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def _leaves_at_once() -> bool:
    """Return whether a thread of PyTorch's may need the interpreter at its end: of a group, or of the rendezvous."""
    return dist.is_initialized() or any(t.name == MEETING for t in threading.enumerate())


def set_up(threads: int) -> None:
    """Set PyTorch's CPU threads (0 leaves the default), make denormals zero, and keep freed memory."""
    require(0 <= threads <= _MOST_THREADS, f"threads={threads}: must be at least 0, at most {_MOST_THREADS}")
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
