"""The greedy choice of router `sized` (engine/routing/planned/sized.py says the rule).

Letters: G experts, E slices, s rows in the order in which they choose.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.routing.loops import compiled
from foreroute.engine.routing.loops.hashes import U64, hash_next

_MOST = np.int64(1 << 62)  # beyond every load


@compiled
def greedy_sized(
    row_s: NDArray[np.int64],
    use_s: NDArray[np.int64],
    state: Any,
    size_G: NDArray[np.int64],
    small_first: bool,
    order_rG: NDArray[Any],
) -> None:
    """Write the order of each row's experts.

    Args:
        use_s: how often the text uses the rows.
        state: hash of all that the choice among candidates depends on besides row and choice.
        size_G: slices of each expert.
        small_first: let the rows that choose first have small experts as their first choice.
    """
    experts = size_G.size
    share = use_s.sum() // experts  # of the first choices, for each expert
    load_EG = np.zeros((size_G.sum(), experts), np.int64)  # [most slices before the choice, expert]
    free_G = np.ones(experts, np.bool_)
    for s in range(row_s.size):
        use = use_s[s]
        row_state = hash_next(state, U64(row_s[s]))
        free_G[:] = True
        before = 0
        for choice in range(experts):
            load_G = load_EG[before]
            size = _MOST  # of candidates; _MOST: any
            if small_first and choice == 0:
                for g in range(experts):
                    if load_G[g] == 0 or load_G[g] + use // 2 <= share:
                        size = min(size, size_G[g])
            lightest = _MOST
            for g in range(experts):
                if free_G[g] and (size == _MOST or size == size_G[g]):
                    lightest = min(lightest, load_G[g])
            count = 0
            for g in range(experts):
                if free_G[g] and (size == _MOST or size == size_G[g]) and load_G[g] <= lightest + use:
                    count += 1
            draw = np.float64(hash_next(row_state, U64(choice)) >> U64(11)) * 2.0**-53
            skip = np.int64(draw * count)
            chosen = 0
            for g in range(experts):
                if free_G[g] and (size == _MOST or size == size_G[g]) and load_G[g] <= lightest + use:
                    if skip == 0:
                        chosen = g
                        break
                    skip -= 1
            free_G[chosen] = False
            order_rG[row_s[s], choice] = chosen
            load_EG[before:, chosen] += use
            before += size_G[chosen]
