"""Loops of the planner: uses of experts, received tokens, and rows sorted by what uses them.

A choice is a row and a thing that it uses, an expert of this rank or a rank. Choices lie one behind the other, row by
row. Loops avoid branches that a processor cannot foresee: they write what may not count, and then move on by 0 or 1.

A row's set is the first count_r of its K columns; an empty count_r: all K. Columns from E on are no experts.

Letters: P ranks of the expert group, T tokens of a rank, E experts, K columns of a row, R rows, c their choices, N =
the rows of all things, as many; L things, J columns without experts, r table rows.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.routing.loops import compiled

Ints = NDArray[np.int64]
Rows = NDArray[np.int32]
Things = NDArray[np.int16]
Counts = NDArray[np.int32]
Weights = NDArray[np.float32]


@compiled
def table_choices(order_rK: NDArray[Any], count_r: Counts, weight_rK: Weights, first: int, last: int) -> Any:
    """List the active ones of the experts first .. last - 1 of each row, ascending and numbered from 0, with weights.

    Returns:
        start_r int32 [r + 1], where the choices of each row begin; expert_c int16, weight_c fp32, both with as many
        more entries at the end as a row has at the most, so that readers may read on.
    """
    rows, k = weight_rK.shape
    start_r = np.zeros(rows + 1, np.int32)
    count, most = 0, 0
    for r in range(rows):
        before = count
        for choice in range(count_r[r] if count_r.size else k):
            count += first <= order_rK[r, choice] < last
        start_r[r + 1] = count
        most = max(most, count - before)
    expert_c, weight_c = np.zeros(count + most, np.int16), np.zeros(count + most, np.float32)
    choice_L = np.full(last - first, -1, np.int64)
    for r in range(rows):
        for choice in range(count_r[r] if count_r.size else k):
            if first <= order_rK[r, choice] < last:
                choice_L[order_rK[r, choice] - first] = choice
        c = start_r[r]
        for expert in range(last - first):
            if choice_L[expert] >= 0:
                expert_c[c], weight_c[c] = expert, weight_rK[r, choice_L[expert]]
                choice_L[expert] = -1
                c += 1
    return start_r, expert_c, weight_c


@compiled
def row_choices(row_R: Rows, start_r: NDArray[np.int32], expert_c: Things, weight_c: Weights) -> Any:
    """List the choices of table rows, found in those of all table rows.

    Returns:
        row_c int64, thing_c int16, weight_c fp32; and start_R int64.
    """
    most = expert_c.size - start_r[-1]
    total = 0
    for i in range(row_R.size):
        total += start_r[np.uint64(row_R[i]) + np.uint64(1)] - start_r[np.uint64(row_R[i])]
    source_c, thing_c = np.empty(total + most, np.int64), np.empty(total + most, np.int16)
    found_c, start_R = np.empty(total + most, np.float32), np.empty(row_R.size, np.int64)
    c = np.uint64(0)
    for i in range(row_R.size):
        begin = np.uint64(start_r[np.uint64(row_R[i])])
        start_R[i] = c
        for more in range(np.uint64(most)):
            source_c[c + more] = i
            thing_c[c + more] = expert_c[begin + more]
            found_c[c + more] = weight_c[begin + more]
        c += np.uint64(start_r[np.uint64(row_R[i]) + np.uint64(1)]) - begin
    return source_c[:total], thing_c[:total], found_c[:total], start_R


@compiled
def rank_choices(order_rK: NDArray[Any], count_r: Counts, row_T: Rows, rank_e: Ints, ranks: int) -> Any:
    """List the ranks that hold one of the active experts of each token's row, each rank once, in any order.

    Args:
        rank_e: the rank of each column; `ranks` for those that are no experts.

    Returns:
        token_c int64, thing_c int16, start_T int64.
    """
    k = order_rK.shape[1]
    token_c, thing_c = np.empty(row_T.size * k + 1, np.int64), np.empty(row_T.size * k + 1, np.int16)
    start_T = np.empty(row_T.size, np.int64)
    last_P = np.full(ranks + 1, -1, np.int64)  # last token that uses the rank
    c = np.uint64(0)
    for t in range(row_T.size):
        start_T[t] = c
        last_P[ranks] = t
        for choice in range(count_r[np.uint64(row_T[t])] if count_r.size else k):
            rank = np.uint64(rank_e[np.uint64(order_rK[np.uint64(row_T[t]), choice])])
            token_c[c], thing_c[c] = t, rank
            c += np.uint64(last_P[rank] != t)
            last_P[rank] = t
    return token_c[:c], thing_c[:c], start_T


@compiled
def count_rows(row_N: Rows, use_r: NDArray[np.int32]) -> None:
    """Add the uses of each table row to use_r."""
    for n in range(row_N.size):
        use_r[np.uint64(row_N[n])] += 1


@compiled
def received_tokens(row_PT: Rows, start: int, stop: int, used_r: NDArray[np.uint8], use_r: NDArray[np.int32]) -> Any:
    """List tokens start .. stop - 1 of every rank whose row is used here; add the uses of all their rows to use_r.

    Returns:
        token_R int64, numbers among the tokens of all ranks; row_R int32; count_P int64.
    """
    ranks, tokens = row_PT.shape
    most = ranks * (stop - start) + 1
    found, row_R = np.empty(most, np.int32), np.empty(most, np.int32)
    count_P = np.zeros(ranks, np.int64)
    end = np.uint64(0)
    for rank in range(ranks):
        before = end
        for t in range(start, stop):
            row = np.uint64(row_PT[rank, t])
            found[end], row_R[end] = rank * tokens + t, row_PT[rank, t]
            end += np.uint64(used_r[row])
            use_r[row] += 1
        count_P[rank] = end - before
    return found[:end].astype(np.int64), row_R[:end], count_P


@compiled
def count_columns(order_rK: NDArray[Any], count_r: Counts, columns: int, use_r: NDArray[np.int32]) -> Any:
    """Count the tokens that use each column, int64 [E + J], from the uses of each table row."""
    rows, k = order_rK.shape
    count_e = np.zeros(columns, np.int64)
    for r in range(rows):
        use = use_r[r]
        if use:
            for choice in range(count_r[r] if count_r.size else k):
                count_e[np.uint64(order_rK[r, choice])] += use
    return count_e


@compiled
def column_weights(
    order_rK: NDArray[Any], count_r: Counts, weight_rK: Weights, row_T: Rows, first: int, columns: int
) -> Any:
    """Return the weight of each token's columns from `first` on, fp32 [T, J]; 0 where its row does not use one."""
    k = order_rK.shape[1]
    weight_TJ = np.zeros((row_T.size, columns - first), np.float32)
    for t in range(row_T.size):
        row = np.uint64(row_T[t])
        for choice in range(count_r[row] if count_r.size else k):
            column = np.int64(order_rK[row, choice]) - first
            if column >= 0:
                weight_TJ[t, column] = weight_rK[row, choice]
    return weight_TJ


@compiled
def by_thing(row_c: Ints, thing_c: Things, weight_c: Weights, things: int) -> Any:
    """Sort choices by thing; those of one thing stay in order.

    Returns:
        source_N int64, end_L int32, weight_N fp32, and each choice's place place_c int64. Where the choices of each row
        ascend, place_c is slot_N of kernels.ExpertRows.
    """
    next_L, end_L = np.zeros(things, np.int64), np.empty(things, np.int32)
    for c in range(thing_c.size):
        next_L[np.uint64(thing_c[c])] += 1
    count = 0
    for thing in range(things):
        next_L[thing], count = count, count + next_L[thing]
        end_L[thing] = count
    source_N, place_c = np.empty(row_c.size, np.int64), np.empty(row_c.size, np.int64)
    weight_N = np.empty(weight_c.size, np.float32)
    for c in range(row_c.size):
        n = np.uint64(next_L[np.uint64(thing_c[c])])
        next_L[np.uint64(thing_c[c])] = n + np.uint64(1)
        source_N[n] = row_c[c]
        place_c[c] = n
        if weight_c.size:
            weight_N[n] = weight_c[c]
    return source_N, end_L, weight_N, place_c


@compiled
def slots_of(source_N: Ints, start_R: Ints) -> Any:
    """Return slot_N int64 of kernels.ExpertRows: each row's places in source_N, ascending."""
    next_R, slot_N = start_R.copy(), np.empty(source_N.size, np.int64)
    for n in range(source_N.size):
        row = np.uint64(source_N[n])
        slot_N[np.uint64(next_R[row])] = n
        next_R[row] += 1
    return slot_N
