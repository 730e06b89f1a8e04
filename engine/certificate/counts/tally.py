"""Distributions of whole numbers that come step by step, exact and small: equal values are kept once, with their
number."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

_LOOSE = 1 << 16  # values kept before equal ones are put together


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution over steps and places."""

    mean: float
    p99: int  # the smallest value that 99 % of all do not exceed
    max: int
    worst_step: int  # the first one with the maximum, counted from 1; 0: there are no values


class Tally:
    """Collects a distribution."""

    def __init__(self) -> None:
        self._values: list[NDArray[np.int64]] = []
        self._times: list[NDArray[np.int64]] = []
        self._loose = 0
        self._max, self._worst_step = -1, 0

    def add(self, values: NDArray[np.int64], step: int, times: int) -> None:
        """Take in values >= 0 of a step that occurs so many times; steps come in ascending order."""
        if not values.size:
            return
        found, number = np.unique(values, return_counts=True)
        self._values.append(found)
        self._times.append(number * times)
        if found[-1] > self._max:
            self._max, self._worst_step = int(found[-1]), step
        self._loose += found.size
        if self._loose > _LOOSE:
            value, number = _put_together([self])
            self._values, self._times, self._loose = [value], [number], 0

    @staticmethod
    def spread(tallies: Sequence["Tally"]) -> Spread:
        """Describe the distribution of all tallies together; zeros if there are no values, as in a dense run."""
        value, number = _put_together(tallies)
        if not value.size:
            return Spread(0.0, 0, 0, 0)
        end = np.cumsum(number)
        worst = max(tallies, key=lambda tally: (tally._max, -tally._worst_step))
        return Spread(
            mean=Tally.total(tallies) / int(end[-1]),
            p99=int(value[np.searchsorted(end, ceil(end[-1] * 99 / 100))]),
            max=worst._max,
            worst_step=worst._worst_step + 1,
        )

    @staticmethod
    def total(tallies: Sequence["Tally"]) -> int:
        """Add up all values of all tallies."""
        value, number = _put_together(tallies)
        return int(value @ number)


def _put_together(tallies: Sequence[Tally]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct values, ascending, and how often each occurs."""
    none = np.zeros(0, np.int64)
    values = np.concatenate([none, *(part for tally in tallies for part in tally._values)])
    times = np.concatenate([none, *(part for tally in tallies for part in tally._times)])
    value, place = np.unique(values, return_inverse=True)
    number = np.zeros(value.size, np.int64)
    np.add.at(number, place, times)
    return value, number
