"""Two sides that run in turn, block of steps after block, so that both are timed at the same load of the machine."""

import multiprocessing
from collections.abc import Iterator, Sequence

_BLOCK = 5
_SECONDS = 900  # that a process waits for the others


class Turns:
    """The turns of real ranks and of replayed ones; every process has a copy.

    Args:
        processes: of both sides.
    """

    def __init__(self, processes: int) -> None:
        self._all_here = multiprocessing.get_context("forkserver").Barrier(processes, timeout=_SECONDS)

    def blocks(self, steps: Sequence[int], *, replayed: bool) -> Iterator[Sequence[int]]:
        """Yield the steps, block by block, each when it is this side's turn; the sides begin every other block."""
        for number, first in enumerate(range(0, len(steps), _BLOCK)):
            for replays_turn in (number % 2 == 1, number % 2 == 0):
                self._all_here.wait()
                if replays_turn is replayed:
                    yield steps[first : first + _BLOCK]
        self._all_here.wait()

    def abort(self) -> None:
        """Raise in all that wait."""
        self._all_here.abort()
