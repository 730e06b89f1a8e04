"""The greedy choice of builders `balanced` and `packed`; engine/routing/tables.py says the rule.

Letters: G blocks, E things, k levels, s rows in the order in which they choose.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.routing.loops import compiled
from foreroute.engine.routing.loops.hashes import U64, hash_next

_USED = np.int64(1 << 62)  # beyond every load


@compiled
def greedy(
    row_s: NDArray[np.int64],
    use_s: NDArray[np.int64],
    state: Any,
    block_rG: NDArray[Any],
    order_rE: NDArray[Any],
    first_rE: NDArray[np.int16],
    levels: int,
) -> None:
    """Write the order of each row's things; choice c is from the row's block number c // pack, pack = E / G.

    Args:
        use_s: how often the text uses the rows.
        state: hash of all that the choice among candidates depends on besides row and choice.
        first_rE: the first level, from 1, at which each row has each choice; empty: 1 .. E.
        levels: how many there are.
    """
    things = order_rE.shape[1]
    pack = things // block_rG.shape[1]
    load_kE = np.zeros((levels, things), np.int64)
    counted = first_rE.size > 0
    used_E, taken_E = np.zeros(things, np.int64), np.zeros(things, np.int64)
    candidate_E = np.zeros(things, np.int64)
    for s in range(row_s.size):
        row, use = row_s[s], use_s[s]
        row_state = hash_next(state, U64(row))
        used_E[:] = 0
        taken_E[:] = 0
        for choice in range(things):
            first = np.int64(block_rG[row, choice // pack]) * pack
            level, after = np.int64(choice), np.int64(choice + 1)  # the row's set is this one below level `after`
            if counted:
                level = np.int64(first_rE[row, choice]) - 1
                after = np.int64(first_rE[row, choice + 1]) - 1 if choice + 1 < things else np.int64(levels)
            load_E = load_kE[level]
            lightest = np.int64(_USED)
            for e in range(first, first + pack):
                lightest = min(lightest, load_E[e] | used_E[e])
            count = np.int64(0)
            for e in range(first, first + pack):
                near = np.int64((load_E[e] | used_E[e]) <= lightest + use)
                candidate_E[e] = near
                count += near
            draw = np.float64(hash_next(row_state, U64(choice)) >> U64(11)) * 2.0**-53
            skip = np.int64(draw * count)
            chosen = first
            while True:
                skip -= candidate_E[chosen]
                if skip < 0:
                    break
                chosen += 1
            used_E[chosen] = _USED
            taken_E[chosen] = use
            for same in range(level, after):
                for e in range(things):
                    load_kE[same, e] += taken_E[e]
            order_rE[row, choice] = chosen
