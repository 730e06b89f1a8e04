"""The planner against plain loops over every rank's route, and against the route itself."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from foreroute.engine.config import Builder, MoEConfig, RouteWeights
from foreroute.engine.errors import UserError
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing import planned_router
from foreroute.engine.routing.plan import Route
from foreroute.engine.routing.planned.fresh import FreshRouter
from foreroute.engine.routing.planned.stochastic import StochasticRouter
from foreroute.engine.routing.planned_router import Draw, GroupTokens, plan_all
from foreroute.engine.routing.plans import planner
from foreroute.engine.routing.plans.planner import Planner
from foreroute.engine.routing.row_sets import Choice, RowSets, equal_weights, softmax_weights
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.routers import hashed, plan_of, route_of

EXPERTS, SYMBOLS = 8, 9


def make_table(experts=EXPERTS, **options):
    ids = np.random.default_rng(0).integers(0, SYMBOLS, 900).astype(np.uint8)
    moe = MoEConfig(experts=experts, ngram=2, rows=32, **options)
    return build_tables(moe, SYMBOLS, ids, num_tables=1, seed=1, cache_dir=None)[0]


def make_ids(ranks, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SYMBOLS, (ranks, 1, tokens), generator=generator)
    return ids, torch.randint(0, SYMBOLS, (ranks, 1, 1), generator=generator)


def chosen_of(route, experts):
    """Of each token the weights of its experts."""
    used_TK = torch.ones_like(route.expert_TK, dtype=torch.bool) if route.used_TK is None else route.used_TK
    rows = zip(route.expert_TK.tolist(), route.weight_TK.tolist(), used_TK.tolist(), strict=True)
    return [{e: w for e, w, used in zip(*row, strict=True) if used and e < experts} for row in rows]


def plain_plan(routes, rank, ranks, experts=EXPERTS):
    """By the definition: rows sent by `rank`, rows received, and for each local expert (received row, weight)."""
    local = experts // ranks
    choices = [chosen_of(route, experts) for route in routes]
    sent = [[t for t, chosen in enumerate(choices[rank]) if any(e // local == q for e in chosen)] for q in range(ranks)]
    received = [[chosen for chosen in choices[s] if any(e // local == rank for e in chosen)] for s in range(ranks)]
    rows = [chosen for chunk in received for chosen in chunk]
    experts = [
        [(r, chosen[e]) for r, chosen in enumerate(rows) if e in chosen]
        for e in range(rank * local, (rank + 1) * local)
    ]
    return sent, [len(chunk) for chunk in received], experts


def check_sets(chunk, routes, first_expert):
    """Of live weights: each received row's whole set, and in it the place of each expert row."""
    sets, columns = chunk.sets, routes[0].expert_TK.shape[1]
    token_R = torch.arange(sum(chunk.recv_splits)) if chunk.received_R is None else chunk.received_R
    assert torch.equal(sets.expert_RK, torch.cat([route.expert_TK for route in routes])[token_R])
    if routes[0].used_TK is None:
        assert sets.used_RK is None
    else:
        assert torch.equal(sets.used_RK, torch.cat([route.used_TK for route in routes])[token_R])
    experts = [first_expert + e for e, count in enumerate(chunk.rows.counts()) for _ in range(count)]
    assert len(experts) == len(sets.place_N)
    for place, row, expert in zip(sets.place_N.tolist(), chunk.rows.source_N.tolist(), experts, strict=True):
        assert place // columns == row and sets.expert_RK.flatten()[place] == expert
        assert sets.used_RK is None or sets.used_RK.flatten()[place]


def check(plan, routes, rank, ranks, k, num_experts=EXPERTS, rtol=1e-6):
    (chunk,) = plan.chunks
    sent, received, experts = plain_plan(routes, rank, ranks, num_experts)
    chunk.rows.validate()
    assert plan.k == k and plan.recv_splits == tuple(received)
    assert chunk.rows.counts() == [len(chosen) for chosen in experts]
    pairs = [pair for chosen in experts for pair in chosen]
    assert chunk.rows.source_N.tolist() == [row for row, _ in pairs]
    if chunk.weight_N is None:
        check_sets(chunk, routes, rank * num_experts // ranks)
    else:
        assert torch.allclose(chunk.weight_N, torch.tensor([w for _, w in pairs]), rtol=rtol, atol=0)
        assert chunk.weight_N.dtype == torch.float32 and chunk.sets is None
    counts = Counter(e for route in routes for chosen in chosen_of(route, num_experts) for e in chosen)
    assert plan.count_E.tolist() == [counts[e] for e in range(num_experts)]
    assert plan.wire_rows == sum(len(chunk) for q, chunk in enumerate(sent) if q != rank)
    if ranks == 1:
        assert chunk.send is None and plan.send_splits == (routes[0].expert_TK.shape[0],)
        return
    chunk.send.validate()
    assert plan.send_splits == tuple(map(len, sent)) == tuple(chunk.send.counts())
    assert chunk.send.source_N.tolist() == [t for tokens in sent for t in tokens]
    for rows in (chunk.rows, chunk.send):  # slots of a row ascend
        starts = [*rows.slot_offset_R.tolist(), rows.num_rows]
        slots = [rows.slot_N[a:b].tolist() for a, b in pairwise(starts)]
        assert slots == [sorted(row) for row in slots]
        assert all(rows.source_N[n] == i for i, row in enumerate(slots) for n in row)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("weights", list(RouteWeights), ids=lambda w: w.name)
def test_plans_of_all_ranks_equal_plain_loops(ranks, k, tokens, weights):
    table = make_table(builder=Builder.random)
    ids, left = make_ids(ranks, tokens)
    plans = []
    for rank in range(ranks):
        router = hashed(table, rank=rank, ranks=ranks, weights=weights)
        routes = [route_of(router, *batch, k) for batch in zip(ids, left, strict=True)]
        plans.append(plan_of(router, ids, left, k))
        check(plans[-1], routes, rank, ranks, k)
    for p, q in np.ndindex(ranks, ranks):  # what one sends the other receives
        assert plans[p].send_splits[q] == plans[q].recv_splits[p]
    assert sum(plan.chunks[0].rows.num_rows for plan in plans) == ranks * tokens * k


def check_all_rows(plan, routes, rank, ranks):
    """Every rank has all rows, and computes those of its experts."""
    (chunk,) = plan.chunks
    chunk.rows.validate()
    rows, local = [chosen for route in routes for chosen in chosen_of(route, EXPERTS)], EXPERTS // ranks
    here = range(rank * local, (rank + 1) * local)
    pairs = [(row, chosen[e]) for e in here for row, chosen in enumerate(rows) if e in chosen]
    assert chunk.send is None and chunk.received_R is None and chunk.rows.num_inputs == len(rows)
    assert chunk.rows.source_N.tolist() == [row for row, _ in pairs]
    if chunk.weight_N is None:
        check_sets(chunk, routes, here.start)
    else:
        torch.testing.assert_close(chunk.weight_N, torch.tensor([weight for _, weight in pairs]))


WEIGH = {"softmax": softmax_weights, "equal": equal_weights, "live": None}


@pytest.mark.parametrize("most", [5, 0])
@pytest.mark.parametrize("weigh", WEIGH)
@pytest.mark.parametrize(("ranks", "gather"), [(1, False), (2, False), (4, False), (4, True)])
def test_sets_of_unlike_sizes_with_columns_that_are_no_experts(ranks, gather, weigh, most):
    """Rows of 0 to `most` columns, three of the eleven without an expert; rows without columns travel nowhere."""
    generator, tokens, rows, columns = torch.Generator().manual_seed(2), 29, 40, EXPERTS + 3
    order_rK = torch.rand(rows, columns, generator=generator).argsort(dim=1)[:, :5].to(torch.uint8)
    count_r = torch.randint(0, most + 1, (rows,), generator=generator, dtype=torch.int32)
    sets = RowSets(order_rK, WEIGH[weigh], torch.randn(rows, 5, generator=generator), count_r)
    row_PT = torch.randint(0, rows, (ranks, tokens), generator=generator)
    routes = []
    for row_T in row_PT.tolist():
        weight_TK = torch.zeros(tokens, 5)
        for t, row in enumerate(row_T):
            parts = [math.exp(score) if weigh == "softmax" else 1 for score in sets.score_rK[row, : count_r[row]]]
            weight_TK[t, : len(parts)] = torch.tensor([part / sum(parts) for part in parts])
        used_TK = torch.arange(5) < count_r[row_T][:, None]
        routes.append(Route(order_rK[row_T].long(), weight_TK, used_TK))
    for rank in range(ranks):
        plan_one = Planner(EXPERTS, columns=columns, rank=rank, ranks=ranks).plan
        plan = plan_one(Choice(row_PT.numpy(), sets), 3, gather=gather)
        if gather or ranks == 1:
            check_all_rows(plan, routes, rank, ranks)
        else:
            check(plan, routes, rank, ranks, 3)
        every = [chosen_of(route, columns) for route in routes]
        counts = Counter(e for chosen in every for row in chosen for e in row)
        assert plan.count_E.tolist() == [counts[e] for e in range(EXPERTS)]
        want = [[row.get(e, 0.0) for e in range(EXPERTS, columns)] for row in every[rank]]
        if weigh != "live":
            torch.testing.assert_close(plan.column_weight_TJ, torch.tensor(want))
        parts = plan_one(Choice(row_PT.numpy(), sets), 3, gather=gather, chunks=4)
        assert torch.equal(parts.count_E, plan.count_E)
        assert (parts.send_splits, parts.recv_splits) == (plan.send_splits, plan.recv_splits)


def test_a_rank_or_an_expert_may_get_nothing():
    table = make_table()
    ids, left = torch.zeros(2, 1, 4, dtype=torch.int64), torch.zeros(2, 1, 1, dtype=torch.int64)
    plans = [plan_of(hashed(table, rank=rank, ranks=2), ids, left, 1) for rank in range(2)]
    rows = [plan.chunks[0].rows for plan in plans]
    assert sorted(each.num_rows for each in rows) == [0, 8]
    empty = rows.index(min(rows, key=lambda each: each.num_rows))
    assert plans[empty].recv_splits == (0, 0) and rows[empty].num_inputs == 0


def test_k_may_change_at_any_time():
    table = make_table()
    router = hashed(table, rank=1, ranks=2)
    ids, left = make_ids(2, 20)
    for k in (1, 4, 2, 8, 1, 3):
        routes = [route_of(router, *batch, k) for batch in zip(ids, left, strict=True)]
        check(plan_of(router, ids, left, k), routes, 1, 2, k)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(("tokens", "chunks"), [(23, 4), (8, 4), (3, 4), (1, 4), (7, 2)])
def test_parts_are_the_plans_of_their_tokens(tokens, chunks, gather):
    """Each chunk is what its tokens' plan alone would be, and names the group's tokens; together they say the same."""
    table = make_table()
    ids, left = make_ids(4, tokens)
    for rank in range(4):
        router = hashed(table, rank=rank, ranks=4)
        whole = plan_of(router, ids, left, 3, gather=gather)
        plan = plan_of(router, ids, left, 3, gather=gather, chunks=chunks)
        assert len(plan.chunks) == min(chunks, tokens) and plan.num_tokens == tokens
        assert (plan.send_splits, plan.recv_splits) == (whole.send_splits, whole.recv_splits)
        assert torch.equal(plan.count_E, whole.count_E) and plan.wire_rows == whole.wire_rows
        assert plan.wire_bytes(5, 2) == whole.wire_bytes(5, 2)
        row_PT = np.stack([table.rows_of(*pair).flatten() for pair in zip(ids, left, strict=True)])
        start, seen = 0, []
        for chunk in plan.chunks:
            span = slice(start, start + chunk.num_tokens)
            choice = Choice(row_PT[:, span], router.row_sets(3))
            (alone,) = Planner(EXPERTS, rank=rank, ranks=4).plan(choice, 3, gather=gather).chunks
            for a, b in zip(chunk.rows.tensors(), alone.rows.tensors(), strict=True):
                assert torch.equal(a, b)
            assert torch.equal(chunk.weight_N, alone.weight_N)
            assert (chunk.send_splits, chunk.recv_splits) == (alone.send_splits, alone.recv_splits)
            assert gather or torch.equal(chunk.send.source_N, alone.send.source_N)
            # received rows in the chunk's own numbering are (rank, token of the chunk)
            places = range(4 * chunk.num_tokens) if alone.received_R is None else alone.received_R.tolist()
            expected = [p // chunk.num_tokens * tokens + start + p % chunk.num_tokens for p in places]
            received = range(4 * tokens) if chunk.received_R is None else chunk.received_R.tolist()
            assert list(received) == expected
            seen += expected
            start = span.stop
        whole_R = range(4 * tokens) if whole.chunks[0].received_R is None else whole.chunks[0].received_R.tolist()
        assert sorted(seen) == list(whole_R)


def test_one_rank_has_nothing_to_exchange_in_parts():
    ids, left = make_ids(1, 9)
    assert len(plan_of(hashed(make_table()), ids, left, 2, chunks=4).chunks) == 1


@pytest.mark.parametrize("weights", list(RouteWeights), ids=lambda w: w.name)
@pytest.mark.parametrize("ranks", [1, 4])
def test_lookups_of_the_rows_that_occur_give_the_same_plans(ranks, weights, monkeypatch):
    """Large tables keep no lookups where a micro-batch has fewer tokens than they have rows."""
    table = make_table()
    for tokens in (20 // ranks, 200):
        ids, left = make_ids(ranks, tokens)
        router = hashed(table, rank=ranks - 1, ranks=ranks, weights=weights)
        routes = [route_of(router, *batch, 2) for batch in zip(ids, left, strict=True)]
        monkeypatch.setattr(planner, "_MOST_KEPT", 0)
        check(plan_of(router, ids, left, 2), routes, ranks - 1, ranks, 2)
        assert len(router._planner._kept) == (tokens == 200)
        monkeypatch.undo()
        check(plan_of(router, ids, left, 2), routes, ranks - 1, ranks, 2)


@pytest.mark.parametrize("k", [1, 8, 300, 512])
@pytest.mark.parametrize("ranks", [1, 2, 64])
def test_512_experts(ranks, k):
    """Beyond a byte: numbers of experts must not wrap."""
    table = make_table(512)
    assert table.order_rE.dtype == torch.int16 and (table.order_rE.sort(dim=1).values == torch.arange(512)).all()
    ids, left = make_ids(ranks, 3)
    for rank in {0, ranks - 1}:
        router = hashed(table, rank=rank, ranks=ranks)
        routes = [route_of(router, *batch, k) for batch in zip(ids, left, strict=True)]
        # the route's softmax adds up k numbers in another order
        check(plan_of(router, ids, left, k), routes, rank, ranks, k, 512, rtol=1e-6 + k * 2**-24)


@pytest.mark.parametrize("kind", [FreshRouter, StochasticRouter])
def test_512_drawn_experts(kind):
    draw = Draw(np.arange(12).reshape(2, 6), 3)
    order = kind(512, seed=1, index=0).order(draw)
    assert (order.sort(dim=1).values == torch.arange(512)).all()
    plans = [plan_of(kind(512, seed=1, index=0).place(Mesh(r, 2, 2)), *make_ids(2, 6), 7, draw) for r in range(2)]
    counts = torch.bincount(order[:, :7].long().flatten(), minlength=512) * (12 // len(order))
    assert [plan.count_E.tolist() for plan in plans] == [counts.tolist()] * 2
    assert [n for plan in plans for n in plan.chunks[0].rows.counts()] == counts.tolist()


def test_routers_share_keys_and_shuffles():
    ids, left = make_ids(2, 12)
    draw = Draw(np.arange(24).reshape(2, 12), 5)
    tables = [make_table(), make_table(16)]
    for shuffled in (False, True):
        group = GroupTokens(ids, left, draw=draw)
        for table in tables:
            router = hashed(table, rank=1, ranks=2, shuffled=shuffled)
            shared = router.plan(group, 2)
            alone = plan_of(router, ids, left, 2, draw)
            assert torch.equal(shared.chunks[0].rows.source_N, alone.chunks[0].rows.source_N)
            assert torch.equal(shared.chunks[0].weight_N, alone.chunks[0].weight_N)
            assert torch.equal(shared.count_E, alone.count_E)
        assert len(group._keys) == 1


def test_padding_is_not_shuffled():
    """Real tokens have the keys of real tokens, each once; without padding nothing changes."""
    ids, left = make_ids(2, 12)
    draw, rows = Draw(np.arange(24).reshape(2, 12), 5), make_table().key_rows
    real = torch.rand(2, 1, 12, generator=torch.Generator().manual_seed(0)) < 0.6
    real = real.view_as(ids)
    tokens = GroupTokens(ids, left, draw=draw, real_PBQ=real)
    own, shuffled, real_PT = tokens.keys(rows), tokens.shuffled_keys(rows), tokens.real_PT
    assert sorted(shuffled[real_PT]) == sorted(own[real_PT]) and (shuffled[~real_PT] == own[~real_PT]).all()
    assert 5 < real_PT.sum() < 20 and (shuffled != own)[real_PT].sum() > 3
    whole = GroupTokens(ids, left, draw=draw).shuffled_keys(rows)
    assert (GroupTokens(ids, left, draw=draw, real_PBQ=real | True).shuffled_keys(rows) == whole).all()


def test_threads_plan_the_same_in_the_same_order(monkeypatch):
    ids, left = make_ids(2, 12)
    routers = [hashed(table, rank=1, ranks=2) for table in (make_table(), make_table(16), make_table(4))] * 3
    want = [plan_of(router, ids, left, 2) for router in routers]
    monkeypatch.setattr(planned_router, "_THREADED", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = plan_all(routers, GroupTokens(ids, left), 2)
    assert [plan.count_E.tolist() for plan in found] == [plan.count_E.tolist() for plan in want]
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one.chunks[0].rows.slot_N, other.chunks[0].rows.slot_N)
        assert torch.equal(one.chunks[0].weight_N, other.chunks[0].weight_N)


def test_experts_that_cannot_be_shared_out_are_refused():
    with pytest.raises(UserError, match=r"moe\.experts=8: must be a multiple of parallel\.expert_ranks=3"):
        hashed(make_table(), rank=0, ranks=3)
