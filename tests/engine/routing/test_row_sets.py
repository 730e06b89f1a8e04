"""Row sets against plain loops over Python floats."""

import math

import numpy as np
import pytest
import torch

from foreroute.engine.routing.row_sets import (
    RowSets,
    column_dtype,
    equal_weights,
    joined,
    softmax_weights,
    unit_weights,
)

PLAIN = {
    softmax_weights: lambda scores: [math.exp(x) / sum(map(math.exp, scores)) for x in scores],
    equal_weights: lambda scores: [1 / len(scores)] * len(scores),
    unit_weights: lambda scores: [1.0] * len(scores),
    None: lambda scores: [0.0] * len(scores),
}


def sets_of(weigh, *, counted):
    generator = torch.Generator().manual_seed(0)
    order_rK = torch.rand(20, 6, generator=generator).argsort(dim=1)[:, :4].to(torch.uint8)
    count_r = torch.arange(20, dtype=torch.int32) % 5 if counted else None
    return RowSets(order_rK, weigh, 3 * torch.randn(20, 4, generator=generator), count_r)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("weigh", PLAIN, ids=lambda weigh: getattr(weigh, "__name__", "live"))
def test_weights_equal_plain_loops(weigh, counted):
    sets = sets_of(weigh, counted=counted)
    dense, weight_rK = sets.dense_weights(6), sets.weights()
    assert weight_rK.dtype == dense.dtype == torch.float32 and weight_rK.isfinite().all()
    for row, order in enumerate(sets.order_rK.tolist()):
        size = row % 5 if counted else 4
        want = PLAIN[weigh](sets.score_rK[row, :size].tolist()) if size else []
        assert weight_rK[row, :size].tolist() == pytest.approx(want, rel=1e-6)
        by_column = dict(zip(order[:size], want, strict=True))
        assert dense[row].tolist() == pytest.approx([by_column.get(e, 0.0) for e in range(6)], rel=1e-6)
        if counted:
            assert sets.used_rK[row].tolist() == [place < size for place in range(4)]
    assert counted or sets.used_rK is None


def test_sets_of_some_rows():
    sets, rows = sets_of(softmax_weights, counted=True), torch.tensor([7, 7, 0, 19])
    some = sets.of_rows(rows)
    assert torch.equal(some.order_rK, sets.order_rK[rows]) and torch.equal(some.used_rK, sets.used_rK[rows])
    assert torch.equal(some.weights(), sets.weights()[rows])
    plain = sets_of(None, counted=False)._replace(score_rK=None).of_rows(rows)
    assert plain.score_rK is None and plain.count_r is None and plain.used_rK is None


def test_number_formats_of_columns():
    assert [column_dtype(columns) for columns in (1, 256, 257, 512)] == [np.uint8, np.uint8, np.int16, np.int16]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("weigh", [weigh for weigh in PLAIN if weigh], ids=lambda weigh: weigh.__name__)
def test_columns_that_a_row_lists_again_are_joined(weigh, counted):
    """Six columns become three."""
    sets = sets_of(weigh, counted=counted)
    sets = sets._replace(order_rK=torch.tensor([2, 0, 1, 0, 2, 2], dtype=torch.uint8)[sets.order_rK.long()])
    found = joined(sets, 3)
    weight_rJ = found.weights()
    assert found.order_rK.dtype == torch.uint8
    for row, listed in enumerate(sets.order_rK.tolist()):
        size = row % 5 if counted else 4
        want, weights = {}, PLAIN[weigh](sets.score_rK[row, :size].tolist()) if size else []
        for column, weight in zip(listed[:size], weights, strict=True):
            want[column] = want.get(column, 0.0) + weight
        count = int(found.count_r[row])
        assert found.order_rK[row, :count].tolist() == list(want)
        assert weight_rJ[row, :count].tolist() == pytest.approx(list(want.values()), rel=1e-6)


def test_the_example_of_joined_columns():
    sets = RowSets(torch.tensor([[1, 0, 1]]), lambda sets: sets.score_rK, torch.tensor([[0.5, 0.3, 0.2]]))
    found = joined(sets, 2)
    assert found.order_rK.tolist() == [[1, 0]]
    torch.testing.assert_close(found.weights(), torch.tensor([[0.7, 0.3]]))
