"""The memory of this process."""

import os
import resource
import sys
from functools import cache

import psutil


def memory_bytes() -> int:
    """Return the resident memory of this process."""
    rss: int = _process(os.getpid()).memory_info().rss
    return rss


@cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)


def peak_memory_bytes() -> int:
    """Return the largest resident memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB except on macOS
