"""Stateless random numbers: a 64-bit hash of integers, and uniforms and normals made from it.

Everything random about a table is a hash of what it belongs to (seed, table, row, choice), so any part of it can be
computed alone, in any order and on any machine, and no generator is consumed. The mixing function is the finaliser of
splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").

`hash64(seed)` is the first output of splitmix64 seeded with `seed`: hash64(0) = 0xE220A8397B1DCDAF and
hash64(1234567) = 6457827717110365317.
"""

from enum import IntEnum, unique
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hash = NDArray[np.uint64]


@unique
class Purpose(IntEnum):
    """First part of each hash: what the number is for, so that no two uses of the same seed draw the same numbers."""

    row = 1  # of an n-gram
    order = 2  # of a row's experts in a block
    tie = 3
    logit = 4
    block_order = 5
    block_tie = 6
    drawn_order = 7  # of experts, anew in each pass
    shuffle = 8  # of keys
    count_tie = 9
    distilled_tie = 10
    sized_tie = 12
    sized_count_tie = 13
    strata_count_tie = 14
    strata_tie = 15
    initial_row = 16  # of an n-gram table
    table_row = 17  # of an n-gram, in an n-gram table


GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, the increment of splitmix64
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # factors of its finaliser
_MASK = 2**64 - 1


def hash64(*parts: int | NDArray[Any]) -> Hash:
    """Hash integers and integer arrays (broadcast against each other) in order; (1, 2) and (2, 1) differ.

    h = 0; for each part: h = mix(h + part + gamma), modulo 2**64. Negative numbers count modulo 2**64.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # wrapping is meant; numpy warns about it for 0-d values
        for part in parts:
            state = _mix(state + _unsigned(part) + GAMMA)
    return state


def uniform(hashes: Hash) -> NDArray[np.float64]:
    """Map hashes to [0, 1): the upper 53 bits as a fraction."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(hashes: Hash) -> NDArray[np.float64]:
    """Map hashes to N(0, 1) by Box and Muller's formula; the second uniform is hash64 of the first hash."""
    radius = np.sqrt(-2.0 * np.log1p(-uniform(hashes)))  # 1 - u lies in (0, 1]: never log 0
    return radius * np.cos(2.0 * np.pi * uniform(hash64(hashes)))


def _unsigned(part: int | NDArray[Any]) -> Hash:
    if isinstance(part, int):
        return np.asarray(part & _MASK, np.uint64)
    return part.astype(np.uint64)


def _mix(z: Hash) -> Hash:
    z = (z ^ (z >> np.uint64(30))) * FIRST
    z = (z ^ (z >> np.uint64(27))) * SECOND
    return z ^ (z >> np.uint64(31))
