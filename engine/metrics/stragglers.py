"""Straggler detection by the ranks' own times (own_ms of engine/metrics/timers.py), which every step's sum carries.

A rank is a straggler when its own time exceeds 1.5 times the median rank's in two successive windows of logged steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

SLOW = 1.5
"""Equal machines differ by less: by uneven numbers of rows, or other programs on a node."""


class Skew(NamedTuple):
    """The rank with the most own time."""

    rank: int
    ratio: float  # of its own time and the median rank's (of two, the lower); 1 when nothing was measured


def skew(own_ms_P: Sequence[float]) -> Skew:
    """Find the slowest rank; of equal ones the first.

    Example: (10, 30, 11, 12) gives rank 1 and the ratio 30 / 11.
    """
    slowest = max(own_ms_P)
    median = sorted(own_ms_P)[(len(own_ms_P) - 1) // 2]
    return Skew(list(own_ms_P).index(slowest), slowest / median if median > 0 else 1.0)


class StragglerDetector:
    """Reports when a rank becomes a straggler, and when it no longer is one."""

    def __init__(self) -> None:
        self._suspected: int | None = None  # slow in the last window
        self._named: int | None = None

    def lines(self, own_ms_P: Sequence[float]) -> list[str]:
        """Add each rank's mean own milliseconds of a window; return the lines to report."""
        rank, ratio = skew(own_ms_P)
        slow = rank if ratio > SLOW else None
        lines = []
        if self._named is not None and slow != self._named:
            lines.append(f"rank {self._named} is no longer slow")
            self._named = None
        if slow is not None and slow == self._suspected and slow != self._named:
            lines.append(
                f"rank {rank} is slow: {own_ms_P[rank]:.1f} ms of its own in a step's forward passes, "
                f"{ratio:.1f} times the median rank's; the others wait for it"
            )
            self._named = rank
        self._suspected = slow
        return lines
