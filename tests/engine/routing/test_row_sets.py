"""Row sets against plain loops over Python floats."""

import math

import numpy as np
import pytest
import torch

from foreroute.engine.routing.row_sets import RowSets, column_dtype, equal_weights, softmax_weights, unit_weights

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
