"""hash64 of engine/routing/hashing.py, one number at a time.

Letters: N keys.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.routing.hashing import FIRST, GAMMA, SECOND
from foreroute.engine.routing.loops import compiled

U64 = np.uint64
# From here on the quotient of a hash is so small that its float64 is off by one at most.
_FLOAT_DIVIDES = 1 << 13


@compiled
def hash_next(state: Any, part: Any) -> Any:
    """Hash one more part: hash64(a, b) = hash_next(hash64(a), b), all uint64."""
    z = state + part + GAMMA
    z = (z ^ (z >> U64(30))) * FIRST
    z = (z ^ (z >> U64(27))) * SECOND
    return z ^ (z >> U64(31))


@compiled
def hash_rows(state: Any, key_N: NDArray[Any], rows: int, row_N: NDArray[Any]) -> None:
    """Write hash_next(state, key) modulo rows for each key; the division is one of float64, put right."""
    modulus, inverse = U64(rows), 1.0 / rows
    if rows < _FLOAT_DIVIDES:
        for n in range(key_N.size):
            row_N[n] = np.int64(hash_next(state, U64(key_N[n])) % modulus)
        return
    for n in range(key_N.size):
        z = hash_next(state, U64(key_N[n]))
        rest = np.int64(z - U64(np.float64(z) * inverse) * modulus)
        rest = rest + rows if rest < 0 else rest
        row_N[n] = rest - rows if rest >= rows else rest
