"""Slices of a dense feed-forward against plain loops over its hidden units, and on ranks."""

import numpy as np
import pytest
import torch

from examples.routers.union_of_experts import SliceRouter, slices_of
from foreroute.engine.config import KernelsConfig, MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.engine.testing.routers import plan_of, route_of
from tests.examples.on_ranks import assert_two_ranks_train_like_one
from tests.references.union_of_experts import feed_forward

NAME = "examples.routers.union_of_experts:SliceRouter"
SYMBOLS, WIDTH, EXPERTS, HIDDEN = 7, 6, 4, 3
MOE = MoEConfig(router=NAME, experts=EXPERTS, expert_width=HIDDEN, ngram=2, rows=64)


def routers():
    text = np.random.default_rng(0).integers(0, SYMBOLS, 500).astype(np.uint8)
    return SliceRouter.build(MOE, RouterInputs(SYMBOLS, 1, 2, text))


def dense():
    torch.manual_seed(0)
    units = EXPERTS * HIDDEN
    shapes = {"w1": (units, WIDTH), "b1": (units,), "w2": (units, WIDTH), "b2": (WIDTH,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.method
@pytest.mark.parametrize("k", [1, 2, EXPERTS])
def test_slices_are_parts_of_the_dense_feed_forward(k):
    """All of them together are the whole, to fp64's rounding."""
    weights, router = dense(), routers()[0]
    layer = MoELayer(WIDTH, MOE, KernelsConfig(), 0).double()
    with torch.no_grad():
        for name, value in slices_of(weights, EXPERTS).items():
            layer.experts.get_parameter(name).copy_(value)
    ids_BQ, left_BC = torch.randint(SYMBOLS, (2, 5)), torch.zeros(2, 1, dtype=torch.int64)
    x_TD = torch.randn(10, WIDTH, dtype=torch.float64)
    got_TD = layer(x_TD, Routing(k, (plan_of(router, ids_BQ[None], left_BC[None], k),))).y_TD
    whole_TD = feed_forward(x_TD, *weights.values())
    if k == EXPERTS:
        torch.testing.assert_close(got_TD, whole_TD, rtol=1e-12, atol=1e-12)
    else:  # the control, and what it is instead
        assert not torch.allclose(got_TD, whole_TD, atol=1e-2)
    for x_D, y_D, slices in zip(x_TD, got_TD, route_of(router, ids_BQ, left_BC, k).expert_TK.tolist(), strict=True):
        units = [e * HIDDEN + f for e in slices for f in range(HIDDEN)]
        bias_D = weights["b2"] * (0 in slices)
        want_1D = feed_forward(x_D[None], weights["w1"], weights["b1"], weights["w2"], bias_D, units)
        torch.testing.assert_close(y_D, want_1D[0], rtol=1e-12, atol=1e-12)


def test_the_table_is_saved_with_the_model():
    found = routers()
    again = SliceRouter.restore(MOE, RouterInputs(SYMBOLS, 1, 2), [router.state() for router in found])
    for one, other in zip(found, again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.identity(), other.identity(), strict=True))
    assert not np.array_equal(found[0].identity()[1], found[1].identity()[1])


def test_uneven_slices_are_refused():
    with pytest.raises(UserError, match="5 slices of 12 hidden units: must divide them"):
        slices_of(dense(), 5)


@pytest.mark.dist
def test_two_ranks_train_like_one():
    assert_two_ranks_train_like_one("union_of_experts:SliceRouter", ngram=2, rows=64)
