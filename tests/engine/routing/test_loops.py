"""How loops are compiled, and the hash that they share with numpy's."""

import numpy as np
import pytest

from foreroute.engine.routing import loops
from foreroute.engine.routing.hashing import hash64
from foreroute.engine.routing.loops.hashes import U64, hash_next
from foreroute.engine.routing.loops.plans import (
    column_weights,
    count_columns,
    rank_choices,
    received_tokens,
    row_choices,
    table_choices,
)


def test_one_part_more_of_a_hash():
    for parts in ((1,), (1, 2), (2**64 - 1, 0), (5, 2**63, 7)):
        assert hash_next(U64(hash64(*parts[:-1])), U64(parts[-1])) == hash64(*parts)


def test_choices_of_table_rows_by_a_literal():
    """Experts 2 and 3 of rows [3, 0, 2], [1, 0, 3] and [0, 1, 2], of which the first two are active."""
    order = np.array([[3, 2], [1, 0], [0, 3]], np.uint8)
    weight = np.array([[0.75, 0.25], [0.5, 0.5], [0.625, 0.375]], np.float32)
    start, expert, found = table_choices(order, np.empty(0, np.int32), weight, 2, 4)
    assert start.tolist() == [0, 2, 2, 3]
    assert expert[:3].tolist() == [0, 1, 1] and found[:3].tolist() == [0.25, 0.75, 0.375]
    assert len(expert) == 3 + 2  # readers may read on
    row, thing, weights, starts = row_choices(np.array([2, 1, 0, 2], np.int32), start, expert, found)
    assert (row.tolist(), thing.tolist()) == ([0, 2, 2, 3], [1, 0, 1, 1])
    assert weights.tolist() == [0.375, 0.25, 0.75, 0.375] and starts.tolist() == [0, 1, 1, 3]


def test_sets_of_unlike_sizes_by_a_literal():
    """Two ranks of two experts, and column 4 without one; the rows use 2, 0, 1 and 3 of their three columns."""
    order = np.array([[3, 4, 0], [1, 0, 2], [2, 3, 1], [4, 1, 0]], np.uint8)
    count = np.array([2, 0, 1, 3], np.int32)
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    start, expert, found = table_choices(order, count, weight, 2, 4)
    assert start.tolist() == [0, 1, 1, 2, 2]
    assert expert[:2].tolist() == [1, 0] and found[:2].tolist() == [0, 6]
    row_T = np.array([3, 1, 0, 2], np.int32)
    token, rank, begins = rank_choices(order, count, row_T, np.array([0, 0, 1, 1, 2]), 2)
    assert (token.tolist(), rank.tolist(), begins.tolist()) == ([0, 2, 3], [0, 1, 1], [0, 1, 1, 2])
    assert count_columns(order, count, 5, np.array([2, 5, 1, 1], np.int32)).tolist() == [1, 1, 1, 2, 3]
    assert column_weights(order, count, weight, row_T, 4, 5).tolist() == [[9], [0], [1], [0]]
    everything = np.empty(0, np.int32)
    assert count_columns(order, everything, 5, np.array([2, 5, 1, 1], np.int32)).tolist() == [8, 7, 6, 3, 3]


def test_received_tokens_by_a_literal():
    """Two ranks of three tokens, of which the last two are asked for; rows 1 and 4 are used here."""
    rows, uses = np.array([[1, 4, 0], [1, 2, 4]], np.int32), np.zeros(5, np.int32)
    token, row, count = received_tokens(rows, 1, 3, np.array([0, 1, 0, 0, 1], np.uint8), uses)
    assert (token.tolist(), row.tolist(), count.tolist()) == ([1, 5], [4, 4], [1, 1])
    assert uses.tolist() == [1, 0, 1, 0, 2]


@pytest.mark.parametrize("writable", [True, False])
def test_code_is_compiled_also_where_it_cannot_be_kept(writable, monkeypatch):
    asked = []

    def njit(**options):
        asked.append(options)
        if options.get("cache") and not writable:
            raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")
        return lambda function: function

    monkeypatch.setattr(loops, "njit", njit)
    assert loops.compiled(max) is max
    options = {"nogil": True, "error_model": "python"}
    assert asked == [options | {"cache": True}] + [options] * (not writable)
