"""The initial values of a table's rows: normal numbers, each a hash of (seed, table, row, column).

A row's values depend on its global number alone, so they are the same on any number of ranks, and a rank makes those of
its own rows.

Letters: L local rows, W width of a row.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.routing.hashing import Purpose, hash64
from foreroute.engine.routing.loops import compiled
from foreroute.engine.routing.loops.hashes import U64, hash_next

_MOST_NUMBERS = 1 << 20  # made at a time


def initial_rows(seed: int, table: int, row_L: range, width: int, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield the initial values of global rows, part by part: where in row_L, and fp64 [part, W].

    They are `scale` times engine.routing.hashing.normal of hash64(Purpose.initial_row, seed, table, row, column).

    Args:
        scale: standard deviation.
    """
    state = np.uint64(hash64(Purpose.initial_row, seed, table))
    for part in parts_of(len(row_L), width):
        value_LW = np.empty((part.stop - part.start, width))
        _fill(state, row_L[part.start], row_L.step, scale, value_LW)
        yield part, torch.from_numpy(value_LW)


def parts_of(rows: int, width: int) -> Iterator[slice]:
    """Yield slices that cover the rows in order, each of about a million numbers.

    Example: 5 rows of 2**19 numbers are 0 and 1, 2 and 3, 4.
    """
    size = max(1, _MOST_NUMBERS // width)
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


@compiled
def _fill(state: Any, first: int, stride: int, scale: float, value_LW: NDArray[Any]) -> None:
    """Write the values of the rows first, first + stride, ... by Box and Muller's formula, as hashing.normal."""
    rows, width = value_LW.shape
    for number in range(rows):
        row_state = hash_next(state, U64(first + number * stride))
        for column in range(width):
            one = hash_next(row_state, U64(column))
            other = hash_next(U64(0), one)
            radius = math.sqrt(-2.0 * math.log1p(-np.float64(one >> U64(11)) * 2.0**-53))
            value_LW[number, column] = (
                scale * radius * math.cos(2.0 * math.pi * np.float64(other >> U64(11)) * 2.0**-53)
            )
