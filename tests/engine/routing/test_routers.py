import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from foreroute.engine.config import MoEConfig, RouteWeights
from foreroute.engine.errors import UserError
from foreroute.engine.routing.live.frozen import FrozenRouter
from foreroute.engine.routing.live.learned import LearnedRouter
from foreroute.engine.routing.live_router import masked_route, top_k_route
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import GroupTokens, RouterInputs
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.routers import route_of

MOE = MoEConfig(experts=6, ngram=2, rows=64)
IDS = torch.tensor([[1, 2, 3], [7, 7, 0]])
LEFT = torch.tensor([[5], [0]])


def hashed(weights=RouteWeights.table):
    ids = np.random.default_rng(0).integers(0, 8, 500).astype(np.uint8)
    moe = replace(MOE, weights=weights)
    return HashedRouter(build_tables(moe, 8, ids, num_tables=1, seed=1, cache_dir=None)[0])


def live_router(kind, width, experts, seed=0):
    torch.manual_seed(seed)
    return kind(width, MoEConfig(experts=experts), 0)


@pytest.mark.method
@pytest.mark.parametrize("k", range(1, 7))
def test_hashed_reads_the_rows_of_its_table(k):
    router = hashed()
    route = route_of(router, IDS, LEFT, k)
    rows = [5 * 8 + 1, 1 * 8 + 2, 2 * 8 + 3, 0 * 8 + 7, 7 * 8 + 7, 7 * 8 + 0]
    assert route.expert_TK.dtype == torch.int64 and route.weight_TK.dtype == torch.float32
    assert route.expert_TK.tolist() == [router.table.order_rE[r, :k].tolist() for r in rows]
    for row, weights in zip(rows, route.weight_TK.tolist(), strict=True):
        parts = [math.exp(value) for value in router.table.logits_rE[row, :k].tolist()]
        assert weights == pytest.approx([part / sum(parts) for part in parts], rel=1e-6)
    assert (route.weight_TK.diff(dim=1) <= 0).all()


def test_hashed_sets_are_nested_and_uniform_weights_are_one_over_k():
    router = hashed(RouteWeights.uniform)
    whole = route_of(router, IDS, LEFT, 6)
    for k in range(1, 7):
        route = route_of(router, IDS, LEFT, k)
        assert torch.equal(route.expert_TK, whole.expert_TK[:, :k])
        assert torch.equal(route.weight_TK, torch.full((6, k), 1 / k))


@pytest.mark.method
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("kind", [FrozenRouter, LearnedRouter])
def test_live_routers_equal_plain_loops(kind, k):
    router = live_router(kind, 7, 5)
    with torch.no_grad():
        router.gate_bias.copy_(torch.linspace(-0.05, 0.05, 5))
    x = torch.randn(11, 7, generator=torch.Generator().manual_seed(1))
    live = router(x, k)
    logits = x.double() @ router.gate_weight.double().T + router.gate_bias.double()
    torch.testing.assert_close(live.logits_TE.double(), logits, rtol=1e-5, atol=1e-7)
    for token, row in enumerate(logits.tolist()):
        chosen = sorted(range(5), key=lambda e: -row[e])[:k]
        parts = [math.exp(row[e]) for e in chosen]
        assert live.route.expert_TK[token].tolist() == chosen
        expected = [part / sum(parts) for part in parts]
        assert live.route.weight_TK[token].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.method
def test_frozen_gate_is_published_initialisation_and_never_trained():
    router = live_router(FrozenRouter, 512, 64)
    assert list(router.parameters()) == []
    assert set(router.state_dict()) == {"gate_weight", "gate_bias"}
    assert abs(router.gate_weight.std() - 0.02) < 3e-4 and abs(router.gate_weight.mean()) < 3e-4
    assert (router.gate_bias == 0).all()
    assert not torch.equal(router.gate_weight, live_router(FrozenRouter, 512, 64, seed=1).gate_weight)


def test_a_frozen_gate_may_count_each_expert_as_1():
    """The same experts as with the softmax, whose weights are others."""
    x_TD = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    routes = []
    for options in ({}, {"sum": True}):
        torch.manual_seed(0)
        routes.append(FrozenRouter(4, MoEConfig(router="frozen", experts=3, options=options))(x_TD, 2).route)
    assert torch.equal(routes[0].expert_TK, routes[1].expert_TK)
    assert (routes[1].weight_TK == 1).all() and not (routes[0].weight_TK == 1).any()
    with pytest.raises(UserError, match=r"moe.options.sum=1: must be true or false"):
        FrozenRouter(4, MoEConfig(router="frozen", options={"sum": 1}))


@pytest.mark.parametrize("kind", [FrozenRouter, LearnedRouter])
def test_gradient_flows_through_the_weights_into_x(kind):
    router = live_router(kind, 4, 3).double()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    factor = torch.tensor([1.0, -2.0])
    (router(x, 2).route.weight_TK * factor).sum().backward()
    # d/dz of softmax over two logits a, b times (1, -2): 3 w_a w_b for a and the opposite for b.
    with torch.no_grad():
        live = router(x, 2)
        slope = 3 * live.route.weight_TK.prod(dim=1, keepdim=True)
        first, second = (router.gate_weight.float()[live.route.expert_TK[:, i]] for i in (0, 1))
        torch.testing.assert_close(x.grad, slope * (first - second), rtol=1e-4, atol=1e-7)
    if kind is LearnedRouter:
        assert router.gate_weight.grad is not None and router.gate_bias.grad.abs().sum() > 0
    else:
        assert not router.gate_weight.requires_grad


@pytest.mark.parametrize("kind", [FrozenRouter, LearnedRouter])
def test_bf16_model_has_an_fp32_gate_product(kind):
    router = live_router(kind, 64, 8).bfloat16()
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.double() @ router.gate_weight.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live = router(x, 3)
    assert live.logits_TE.dtype == live.route.weight_TK.dtype == torch.float32
    torch.testing.assert_close(live.logits_TE.double(), exact, rtol=1e-5, atol=1e-6)
    rounded = (x @ router.gate_weight.T).double()
    assert (rounded - exact).abs().max() > 1e-4  # what a bf16 product would have given


def test_top_k_route_of_a_literal():
    live = top_k_route(torch.tensor([[0.0, 2.0, math.log(3) + 2.0]]), 2)
    assert live.route.expert_TK.tolist() == [[2, 1]]
    assert live.route.weight_TK.tolist()[0] == pytest.approx([0.75, 0.25])


def test_masked_route_of_a_literal():
    chosen_TE, weight_TE = torch.tensor([[True, False, True], [False] * 3]), torch.rand(2, 3)
    live = masked_route(chosen_TE, weight_TE, torch.zeros(2, 3), rows=2)
    assert live.route.expert_TK.tolist() == [[0, 1, 2]] * 2 and live.route.rows == 2
    assert torch.equal(live.route.used_TK, chosen_TE) and torch.equal(live.route.weight_TK, weight_TE)
    assert live.carried is None and live.column_weight_TJ is None


@pytest.mark.parametrize("weights", [RouteWeights.sum, RouteWeights.live])
def test_weights_that_are_added_up_and_weights_of_a_gate(weights):
    """The table is that of other weights; `live` leaves the weights to a gate."""
    table = hashed().table
    router = HashedRouter(table, weights=weights)
    sets = router.row_sets(3)
    assert torch.equal(sets.order_rK, table.order_rE[:, :3]) and (sets.weigh is None) == (weights is RouteWeights.live)
    assert torch.equal(sets.weights(), torch.full((64, 3), float(weights is RouteWeights.sum)))
    assert route_of(router, IDS, LEFT, 3).expert_TK.tolist() == route_of(hashed(), IDS, LEFT, 3).expert_TK.tolist()


def test_experts_without_rows_are_the_tables_last_columns():
    """Over all columns the table is balanced; the planner knows the first six as experts."""
    ids = np.random.default_rng(0).integers(0, 8, 500).astype(np.uint8)
    moe = replace(MOE, constant_experts=1, null_experts=1)
    (table,) = build_tables(moe, 8, ids, num_tables=1, seed=1, cache_dir=None)
    (router,) = HashedRouter.of_tables(moe, [table])
    assert (router.experts, router.columns, table.order_rE.shape[1]) == (6, 8, 8)
    tokens = GroupTokens(IDS[None], LEFT[None])
    for k in (1, 3, 8):
        plan, route = router.plan(tokens, k), route_of(router, IDS, LEFT, k)
        chosen = [
            dict(zip(*row, strict=True)) for row in zip(route.expert_TK.tolist(), route.weight_TK.tolist(), strict=True)
        ]
        assert plan.count_E.tolist() == [sum(e in row for row in chosen) for e in range(6)]
        want = torch.tensor([[row.get(6, 0.0), row.get(7, 0.0)] for row in chosen])
        torch.testing.assert_close(plan.column_weight_TJ, want)
    assert k == 8 and plan.count_E.tolist() == [6] * 6 and plan.column_weight_TJ.all()


def test_a_router_from_its_state_plans_the_same():
    router = hashed()
    state, moe = router.state(), MOE
    (again,) = HashedRouter.restore(moe, RouterInputs(8, 1, 1), [state])
    for own, other in zip(router.identity(), again.identity(), strict=True):
        assert np.array_equal(own, other)
    assert len(router.identity(weights=False)) == len(router.identity()) - 1
