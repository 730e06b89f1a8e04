"""Numbers of experts of table rows whose mean over a text is k, for every k at once.

A rule gives each row, for each of its choices, a whole number: its value. At k the rows have the choices of the lowest
values, as many as make the mean number k. Sorted once by value, equal ones by a hash of row and choice, the choices of
every k are a prefix, so the numbers are nested in k, and k is solved in whole numbers. The mean differs from k by at
most half the share of the text that the most frequent row has, since a prefix has all of a row's uses or none.

A rule does not see which expert a choice is: builders balance the experts at these numbers afterwards.

Letters: r table rows, E choices of a row (experts), s rows that take part, n their choices but for the first `least`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.routing.hashing import Hash, Purpose, hash64

Values = NDArray[np.int64]
Firsts = NDArray[np.int16]
Value = Callable[[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]], Values]
"""From rows [s], their fixed logits in descending order [s, E] and uses in the text [s] to the values [s, E] of their
choices; those of a row must not descend."""


class CountRule(NamedTuple):
    """A rule for the number of experts of each row of a table."""

    key: tuple[Any, ...]  # all that `value` and the fields below depend on, as JSON has it: part of a cache's key
    value: Value
    least: int = 1  # choices that every row has at every k
    unseen: bool = False  # rows that the text does not use have values too; otherwise they have k choices


def first_k(
    rule: CountRule, logits_rE: NDArray[np.floating[Any]], use_r: NDArray[np.int64], *, seed: int, index: int
) -> Firsts:
    """Return the first k [r, E] at which each row has each of its choices, ascending in a row; at E it has all.

    Args:
        use_r: how often the text uses each row.
        seed: of the hash that orders equal values.
        index: of the same, number of the table.
    """
    rows, most = logits_rE.shape
    first_rE = np.broadcast_to(np.arange(1, most + 1, dtype=np.int16), (rows, most)).copy()
    row_s = np.arange(rows) if rule.unseen else np.flatnonzero(use_r)
    if row_s.size:
        tie_sE = hash64(Purpose.count_tie, seed, index, row_s[:, None], np.arange(most))
        value_sE = rule.value(row_s, logits_rE[row_s].astype(np.float64), use_r[row_s])
        first_rE[row_s] = solve(value_sE, use_r[row_s], tie_sE, least=rule.least)
    return first_rE


def solve(
    value_sE: Values, use_s: NDArray[np.int64], tie_sE: Hash, *, least: int, size_sE: Values | None = None
) -> Firsts:
    """Return the first k, from 1 to the most that a row can have, at which each row has each of its choices.

    Example: two rows of three choices with values [1, 5, 9] and [2, 3, 9], the first used once and the second three
    times, least 0. At k = 1 the mean over the four uses is to be 1: the choices of values 1 and 2 come first and make
    (1 + 3) / 4. At k = 2 those of values 3 and 5 are there too. So the firsts are [1, 2, 3] and [1, 2, 3].

    Args:
        value_sE: must not descend in a row; must ascend where size_sE is given.
        use_s: uses of each row.
        tie_sE: the order of equal values.
        least: choices that every row has at k = 1.
        size_sE: how much of k each choice is; the same sum in every row. None: 1.
    """
    rows, choices = value_sE.shape
    sizes = np.broadcast_to(np.int64(1), value_sE.shape) if size_sE is None else size_sE
    most, counted = int(sizes[0].sum()), choices - least
    order_n = np.lexsort((tie_sE[:, least:].ravel(), value_sE[:, least:].ravel()))
    mass_n = np.concatenate([[0], (use_s[:, None] * sizes[:, least:]).ravel()[order_n].cumsum()])
    want_k = np.arange(1, most + 1) * use_s.sum() - use_s @ sizes[:, :least].sum(axis=1)
    after_k = np.searchsorted(mass_n, want_k).clip(1, order_n.size) if counted else np.zeros(most, np.int64)
    before_k = np.maximum(after_k - 1, 0)
    nearer_k = np.abs(mass_n[before_k] - want_k) <= np.abs(mass_n[after_k] - want_k)
    end_k = np.where(nearer_k, before_k, after_k)
    end_k[-1] = order_n.size
    first_n = 1 + np.searchsorted(end_k, np.arange(order_n.size), side="right")
    first_sE = np.ones((rows, choices), np.int16)
    by_row_n = np.argsort(order_n // max(counted, 1), kind="stable")
    first_sE[:, least:] = first_n[by_row_n].reshape(rows, counted)
    return first_sE
