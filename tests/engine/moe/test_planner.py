"""The planner against plain loops over every rank's route, and against the route itself."""

import numpy as np
import pytest
import torch

from engine.config import Builder, MoEConfig, RouteWeights
from engine.errors import UserError
from engine.moe.routers import HashedRouter
from engine.moe.tables import build_tables

EXPERTS, SYMBOLS = 8, 9


def make_table(**options):
    ids = np.random.default_rng(0).integers(0, SYMBOLS, 900).astype(np.uint8)
    moe = MoEConfig(experts=EXPERTS, ngram=2, rows=32, **options)
    return build_tables(moe, SYMBOLS, ids, num_tables=1, seed=1, cache_dir=None)[0]


def make_ids(ranks, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SYMBOLS, (ranks, 1, tokens), generator=generator)
    return ids, torch.randint(0, SYMBOLS, (ranks, 1, 1), generator=generator)


def plain_plan(routes, rank, ranks):
    """By the definition: rows sent by `rank`, rows received, and for each local expert (received row, weight)."""
    local = EXPERTS // ranks
    choices = [
        [dict(zip(e, w, strict=True)) for e, w in zip(route.expert_TK.tolist(), route.weight_TK.tolist(), strict=True)]
        for route in routes
    ]  # fmt: skip
    sent = [[t for t, chosen in enumerate(choices[rank]) if any(e // local == q for e in chosen)] for q in range(ranks)]  # fmt: skip
    received = [[chosen for chosen in choices[s] if any(e // local == rank for e in chosen)] for s in range(ranks)]  # fmt: skip
    rows = [chosen for part in received for chosen in part]
    experts = [
        [(r, chosen[e]) for r, chosen in enumerate(rows) if e in chosen]
        for e in range(rank * local, (rank + 1) * local)
    ]
    return sent, [len(part) for part in received], experts


def check(plan, routes, rank, ranks, k):
    sent, received, experts = plain_plan(routes, rank, ranks)
    plan.rows.validate()
    assert plan.k == k and plan.recv_splits == tuple(received)
    assert plan.rows.counts() == [len(part) for part in experts]
    pairs = [pair for part in experts for pair in part]
    assert plan.rows.source_N.tolist() == [row for row, _ in pairs]
    assert torch.allclose(plan.weight_N, torch.tensor([w for _, w in pairs]), rtol=1e-6, atol=0)
    assert plan.weight_N.dtype == torch.float32
    counts = sum(torch.bincount(route.expert_TK.flatten(), minlength=EXPERTS) for route in routes)
    assert plan.count_E.tolist() == counts.tolist()
    assert plan.wire_rows == sum(len(part) for q, part in enumerate(sent) if q != rank)
    if ranks == 1:
        assert plan.send is None and plan.send_splits == (routes[0].expert_TK.shape[0],)
        return
    plan.send.validate()
    assert plan.send_splits == tuple(map(len, sent)) == tuple(plan.send.counts())
    assert plan.send.source_N.tolist() == [t for part in sent for t in part]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("weights", list(RouteWeights), ids=lambda w: w.name)
def test_plans_of_all_ranks_equal_plain_loops(ranks, k, tokens, weights):
    table = make_table(weights=weights, builder=Builder.random)
    ids, left = make_ids(ranks, tokens)
    plans = []
    for rank in range(ranks):
        router = HashedRouter(table, rank=rank, ranks=ranks)
        routes = [router.route(*batch, k) for batch in zip(ids, left, strict=True)]
        plans.append(router.plan(ids, left, k))
        check(plans[-1], routes, rank, ranks, k)
    for p, q in np.ndindex(ranks, ranks):  # what one sends the other receives
        assert plans[p].send_splits[q] == plans[q].recv_splits[p]
    assert sum(plan.rows.num_rows for plan in plans) == ranks * tokens * k


def test_a_rank_or_an_expert_may_get_nothing():
    table = make_table()
    ids, left = torch.zeros(2, 1, 4, dtype=torch.int64), torch.zeros(2, 1, 1, dtype=torch.int64)
    plans = [HashedRouter(table, rank=rank, ranks=2).plan(ids, left, 1) for rank in range(2)]
    assert sorted(plan.rows.num_rows for plan in plans) == [0, 8]
    empty = min(plans, key=lambda plan: plan.rows.num_rows)
    assert empty.recv_splits == (0, 0) and empty.rows.num_inputs == 0


def test_k_may_change_at_any_time():
    table = make_table()
    router = HashedRouter(table, rank=1, ranks=2)
    ids, left = make_ids(2, 20)
    for k in (1, 4, 2, 8, 1, 3):
        routes = [router.route(*batch, k) for batch in zip(ids, left, strict=True)]
        check(router.plan(ids, left, k), routes, 1, 2, k)


def test_large_and_small_batches_count_alike():
    """Counting takes another way when a batch has fewer tokens than the table has rows."""
    table = make_table()
    router = HashedRouter(table)
    for tokens in (20, 200):
        ids, left = make_ids(1, tokens)
        check(router.plan(ids, left, 2), [router.route(ids[0], left[0], 2)], 0, 1, 2)


def test_experts_that_cannot_be_shared_out_are_refused():
    with pytest.raises(UserError, match=r"moe\.experts=8: must be a multiple of .* 3 ranks"):
        HashedRouter(make_table(), rank=0, ranks=3)
