"""The greedy choice of router `strata` (engine/routing/planned/strata.py says the rule).

Letters: E experts, k levels, s rows in the order in which they choose.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.routing.loops import compiled
from foreroute.engine.routing.loops.hashes import U64, hash_next


@compiled
def lightest_experts(
    row_s: NDArray[np.int64],
    use_s: NDArray[np.int64],
    first_s: NDArray[np.int16],
    levels: int,
    experts: int,
    state: Any,
    expert_r: NDArray[Any],
) -> None:
    """Write the one expert of each row: the lightest at the row's first level, equal ones by a hash of the row.

    Args:
        use_s: how often the text uses the rows.
        first_s: the first level, from 1 to `levels`, at which the row has it.
    """
    load_kE = np.zeros((levels, experts), np.int64)
    for s in range(row_s.size):
        load_E = load_kE[first_s[s] - 1]
        lightest = load_E.min()
        skip = np.int64(hash_next(state, U64(row_s[s])) % U64((load_E == lightest).sum()))
        for e in range(experts):
            if load_E[e] == lightest:
                if skip == 0:
                    expert_r[row_s[s]] = e
                    load_kE[first_s[s] - 1 :, e] += use_s[s]
                    break
                skip -= 1
