"""Tables of merged and pruned experts against plain loops over their rows."""

import math

import numpy as np
import pytest
import torch

from foreroute.engine.compress.groups import DROPPED, Groups
from foreroute.engine.compress.tables import regrouped_table
from foreroute.engine.config import Builder, MoEConfig, RouteWeights
from foreroute.engine.routing.methods import planned_method
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.engine.routing.tables import table_from_state, table_state

V = 7
IDS = np.random.default_rng(0).integers(0, V, 500)
MERGED = Groups(np.array([0, 2, 5]), np.array([0, 1, 1, 0, 2, 2]))
PRUNED = Groups(np.array([0, 2, 3, 5]), np.array([0, DROPPED, 1, 2, DROPPED, 3]))


def both(groups, **options):
    """The router of six experts and its successor, as a checkpoint has them."""
    moe = MoEConfig(experts=6, ngram=2, rows=30, **options)
    method = planned_method(moe)
    (before,) = method.build(moe, RouterInputs(V, 1, 1, IDS))
    table = regrouped_table(before.table, groups, moe.columns)
    after = MoEConfig(
        experts=len(groups.leader_G), ngram=2, rows=30, **{**options, "builder": table.builder, "pack": None}
    )
    (router,) = method.of_tables(after, [table_from_state(table_state(table))])
    return before, router


def used(router, k):
    """Each row's experts and weights at k, in its order."""
    sets = router.row_sets(k)
    weight_rK, count_r = sets.weights(), sets.count_r
    for row, (order, weights) in enumerate(zip(sets.order_rK.tolist(), weight_rK.tolist(), strict=True)):
        count = len(order) if count_r is None else int(count_r[row])
        yield dict(zip(order[:count], weights[:count], strict=True))


ROUTERS = [
    {},
    {"weights": RouteWeights.uniform},
    {"weights": RouteWeights.sum},
    {"builder": Builder.packed, "pack": 2},
    {"router": "by_frequency", "options": {"power": 0.5}},
    {"router": "top_p"},
    {"router": "top_p", "options": {"raw": True}},
    {"copy_experts": 1, "null_experts": 1},
]


@pytest.mark.parametrize("options", ROUTERS, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_merged_experts_have_the_weights_of_their_members(options, k):
    before, after = both(MERGED, **options)
    joined = 0
    for old, new in zip(used(before, k), used(after, k), strict=True):
        want = {}
        for expert, weight in old.items():
            group = int(MERGED.group_E[expert]) if expert < 6 else expert - 3
            want[group] = want.get(group, 0.0) + weight
        assert list(new) == list(want) and list(new.values()) == pytest.approx(list(want.values()), rel=1e-5)
        joined += len(old) - len(new)
    assert joined > 0 or k == 1
    assert after.experts == 3 and after.columns == before.columns - 3


@pytest.mark.parametrize("options", [o for o in ROUTERS if o.get("router") is None], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_pruned_rows_take_the_next_experts_of_their_order(options, k):
    before, after = both(PRUNED, **options)
    logits_rE = before.table.logits_rE
    for row, new in enumerate(used(after, k)):
        left = [(e, place) for place, e in enumerate(before.table.order_rE[row].tolist()) if e not in (1, 4)]
        want = [int(PRUNED.group_E[e]) if e < 6 else e - 2 for e, _ in left[:k]]
        weights = {RouteWeights.uniform: [1 / k] * k, RouteWeights.sum: [1.0] * k}.get(options.get("weights"))
        if weights is None:
            exps = [math.exp(logits_rE[row, place].item()) for _, place in left[:k]]
            weights = [one / sum(exps) for one in exps]
        assert list(new) == want and list(new.values()) == pytest.approx(weights, rel=1e-5)
    assert after.experts == 4 and after.table.order_rE.shape[1] == after.columns


def test_numbers_of_experts_stay_those_of_the_rows():
    """Of a router whose rows use unequally many, up to the experts that are left."""
    before, after = both(PRUNED, router="by_frequency", options={"power": 0.5})
    counts = [torch.tensor([len(row) for row in used(router, 2)]) for router in (before, after)]
    assert torch.equal(counts[0].clamp(max=4), counts[1]) and len(counts[0].unique()) > 1
