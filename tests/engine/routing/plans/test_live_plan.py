"""Limits of a live router's plan; the plan itself is compared with one rank's on ranks (test_layer_on_ranks.py)."""

import pytest
import torch

from foreroute.engine.routing.plan import Route, rows_of_mask
from foreroute.engine.routing.plans.live_plan import build_live_plan


class Asked(Exception):
    """The plan has got as far as to ask the other ranks."""


class ExpertGroupComm:
    rank, ranks = 1, 2

    def all_gather(self, rows):
        raise Asked


def route(tokens, dtype):
    """All tokens take expert 0; without memory for each of them."""
    expert_TK = torch.zeros(1, 1, dtype=torch.int64)
    return Route(expert_TK.expand(tokens, 1), torch.ones(1, 1, dtype=dtype).expand(tokens, 1))


@pytest.mark.parametrize(
    ("tokens", "dtype", "fits"),
    [(2**23, torch.float32, True), (2**23 + 1, torch.float32, False), (2**23 + 1, torch.float64, True)],
)
def test_token_numbers_fit_into_the_format_of_the_weights(tokens, dtype, fits):
    """fp32 holds all whole numbers up to 2**24, and two ranks have twice the tokens."""
    with pytest.raises(Asked if fits else ValueError, match=None if fits else "must be at most 16777216 together"):
        build_live_plan(route(tokens, dtype), 2, ExpertGroupComm())


def test_rows_of_experts_and_of_rows_that_nobody_uses():
    rows, place_N = rows_of_mask(torch.tensor([[True, False], [True, True]]), 3)
    assert (rows.source_N.tolist(), rows.offset_L.tolist()) == ([0, 1, 1], [2, 3])
    assert (rows.slot_N.tolist(), rows.slot_offset_R.tolist()) == ([0, 1, 2], [0, 1])
    assert place_N.tolist() == [0, 1, 3]  # the docstring's
    mask = torch.tensor([[False, False, True], [False] * 3, [True, False, True], [False, False, True]])
    rows, place_N = rows_of_mask(mask, 4)
    assert (rows.source_N.tolist(), rows.offset_L.tolist()) == ([2, 0, 2, 3], [1, 1, 4])
    assert (rows.slot_N.tolist(), rows.slot_offset_R.tolist()) == ([1, 0, 2, 3], [0, 1, 1, 3])
    assert place_N.tolist() == [2, 8, 10, 11]
    empty, _ = rows_of_mask(torch.zeros(0, 2, dtype=torch.bool), 0)
    assert empty.source_N.tolist() == [] and empty.offset_L.tolist() == [0, 0]
