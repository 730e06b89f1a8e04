"""Numbers of experts of table rows at a mean, and orders that are balanced at them, in plain loops."""

from collections.abc import Callable, Sequence

import numpy as np


def counts_at(values: Sequence[Sequence[int]], uses: Sequence[int], ties: Sequence[Sequence[int]], k: int, least: int):
    """Return the numbers whose mean over the uses is nearest to k, of two equally near ones the smaller.

    Every row has `least` choices; more of all rows come in the order of their values, equal ones in that of ties.
    """
    events = sorted((value, ties[r][c], r) for r, row in enumerate(values) for c, value in enumerate(row) if c >= least)
    counts, total = [least] * len(values), sum(uses)
    mass = least * total
    best, distance = list(counts), abs(k * total - mass)
    for _, _, row in events:
        counts[row] += 1
        mass += uses[row]
        if abs(k * total - mass) < distance:
            best, distance = list(counts), abs(k * total - mass)
    return best


def balanced_orders(
    counts: Callable[[int, int], int], uses: dict[int, int], experts: int, draw: Callable[[int, int], float]
) -> dict[int, list[int]]:
    """Return the orders of the used rows, the most frequent first, ties by number.

    For a row's choice c let k be the first at which counts(row, k) > c. Among the experts that the row does not have,
    those are candidates whose rows at this k are within the row's uses of the fewest; draw(row, c) in [0, 1) takes one.

    Args:
        counts: the number of experts of a row at a k.
    """
    orders: dict[int, list[int]] = {}
    load = np.zeros((experts + 1, experts), np.int64)  # at each k
    for row in sorted(uses, key=lambda r: (-uses[r], r)):
        order: list[int] = []
        for choice in range(experts):
            k = next(k for k in range(1, experts + 1) if counts(row, k) > choice)
            free = [e for e in range(experts) if e not in order]
            lightest = min(load[k][e] for e in free)
            near = [e for e in free if load[k][e] <= lightest + uses[row]]
            order.append(near[int(draw(row, choice) * len(near))])
        for k in range(1, experts + 1):
            for expert in order[: counts(row, k)]:
                load[k][expert] += uses[row]
        orders[row] = order
    return orders
