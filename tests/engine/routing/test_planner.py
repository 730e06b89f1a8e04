"""The planner against plain loops over every rank's route, and against the route itself."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from foreroute.engine.config import Builder, MoEConfig, RouteWeights
from foreroute.engine.errors import UserError
from foreroute.engine.routing import planner, routers
from foreroute.engine.routing.routers import Draw, DrawnRouter, GroupIds, HashedRouter
from foreroute.engine.routing.tables import build_tables

EXPERTS, SYMBOLS = 8, 9


def make_table(experts=EXPERTS, **options):
    ids = np.random.default_rng(0).integers(0, SYMBOLS, 900).astype(np.uint8)
    moe = MoEConfig(experts=experts, ngram=2, rows=32, **options)
    return build_tables(moe, SYMBOLS, ids, num_tables=1, seed=1, cache_dir=None)[0]


def make_ids(ranks, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SYMBOLS, (ranks, 1, tokens), generator=generator)
    return ids, torch.randint(0, SYMBOLS, (ranks, 1, 1), generator=generator)


def plain_plan(routes, rank, ranks, experts=EXPERTS):
    """By the definition: rows sent by `rank`, rows received, and for each local expert (received row, weight)."""
    local = experts // ranks
    choices = [
        [dict(zip(e, w, strict=True)) for e, w in zip(route.expert_TK.tolist(), route.weight_TK.tolist(), strict=True)]
        for route in routes
    ]
    sent = [[t for t, chosen in enumerate(choices[rank]) if any(e // local == q for e in chosen)] for q in range(ranks)]
    received = [[chosen for chosen in choices[s] if any(e // local == rank for e in chosen)] for s in range(ranks)]
    rows = [chosen for chunk in received for chosen in chunk]
    experts = [
        [(r, chosen[e]) for r, chosen in enumerate(rows) if e in chosen]
        for e in range(rank * local, (rank + 1) * local)
    ]
    return sent, [len(chunk) for chunk in received], experts


def check(plan, routes, rank, ranks, k, num_experts=EXPERTS, rtol=1e-6):
    (chunk,) = plan.chunks
    sent, received, experts = plain_plan(routes, rank, ranks, num_experts)
    chunk.rows.validate()
    assert plan.k == k and plan.recv_splits == tuple(received)
    assert chunk.rows.counts() == [len(chosen) for chosen in experts]
    pairs = [pair for chosen in experts for pair in chosen]
    assert chunk.rows.source_N.tolist() == [row for row, _ in pairs]
    assert torch.allclose(chunk.weight_N, torch.tensor([w for _, w in pairs]), rtol=rtol, atol=0)
    assert chunk.weight_N.dtype == torch.float32
    counts = sum(torch.bincount(route.expert_TK.flatten(), minlength=num_experts) for route in routes)
    assert plan.count_E.tolist() == counts.tolist()
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
    assert sum(plan.chunks[0].rows.num_rows for plan in plans) == ranks * tokens * k


def test_a_rank_or_an_expert_may_get_nothing():
    table = make_table()
    ids, left = torch.zeros(2, 1, 4, dtype=torch.int64), torch.zeros(2, 1, 1, dtype=torch.int64)
    plans = [HashedRouter(table, rank=rank, ranks=2).plan(ids, left, 1) for rank in range(2)]
    rows = [plan.chunks[0].rows for plan in plans]
    assert sorted(each.num_rows for each in rows) == [0, 8]
    empty = rows.index(min(rows, key=lambda each: each.num_rows))
    assert plans[empty].recv_splits == (0, 0) and rows[empty].num_inputs == 0


def test_k_may_change_at_any_time():
    table = make_table()
    router = HashedRouter(table, rank=1, ranks=2)
    ids, left = make_ids(2, 20)
    for k in (1, 4, 2, 8, 1, 3):
        routes = [router.route(*batch, k) for batch in zip(ids, left, strict=True)]
        check(router.plan(ids, left, k), routes, 1, 2, k)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(("tokens", "chunks"), [(23, 4), (8, 4), (3, 4), (1, 4), (7, 2)])
def test_parts_are_the_plans_of_their_tokens(tokens, chunks, gather):
    """Each chunk is what its tokens' plan alone would be, and names the group's tokens; together they say the same."""
    table = make_table()
    ids, left = make_ids(4, tokens)
    for rank in range(4):
        router = HashedRouter(table, rank=rank, ranks=4)
        whole = router.plan(ids, left, 3, gather=gather)
        plan = router.plan(ids, left, 3, gather=gather, chunks=chunks)
        assert len(plan.chunks) == min(chunks, tokens) and plan.num_tokens == tokens
        assert (plan.send_splits, plan.recv_splits) == (whole.send_splits, whole.recv_splits)
        assert torch.equal(plan.count_E, whole.count_E) and plan.wire_rows == whole.wire_rows
        assert plan.wire_bytes(5, 2) == whole.wire_bytes(5, 2)
        row_PT = np.stack([table.rows_of(*pair).flatten() for pair in zip(ids, left, strict=True)])
        start, seen = 0, []
        for chunk in plan.chunks:
            span = slice(start, start + chunk.num_tokens)
            (alone,) = router.planner.plan(row_PT[:, span], 3, gather=gather).chunks
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
    assert len(HashedRouter(make_table()).plan(ids, left, 2, chunks=4).chunks) == 1


@pytest.mark.parametrize("weights", list(RouteWeights), ids=lambda w: w.name)
@pytest.mark.parametrize("ranks", [1, 4])
def test_lookups_of_the_rows_that_occur_give_the_same_plans(ranks, weights, monkeypatch):
    """Large tables keep no lookups where a micro-batch has fewer tokens than they have rows."""
    table = make_table(weights=weights)
    for tokens in (20 // ranks, 200):
        ids, left = make_ids(ranks, tokens)
        router = HashedRouter(table, rank=ranks - 1, ranks=ranks)
        routes = [router.route(*batch, 2) for batch in zip(ids, left, strict=True)]
        monkeypatch.setattr(planner, "_MOST_KEPT", 0)
        check(router.plan(ids, left, 2), routes, ranks - 1, ranks, 2)
        assert len(router.planner._lookups) == (tokens == 200)
        monkeypatch.undo()
        check(router.plan(ids, left, 2), routes, ranks - 1, ranks, 2)


@pytest.mark.parametrize("k", [1, 8, 300, 512])
@pytest.mark.parametrize("ranks", [1, 2, 64])
def test_512_experts(ranks, k):
    """Beyond a byte: numbers of experts must not wrap."""
    table = make_table(512)
    assert table.order_rE.dtype == torch.int16 and (table.order_rE.sort(dim=1).values == torch.arange(512)).all()
    ids, left = make_ids(ranks, 3)
    for rank in {0, ranks - 1}:
        router = HashedRouter(table, rank=rank, ranks=ranks)
        routes = [router.route(*batch, k) for batch in zip(ids, left, strict=True)]
        # the route's softmax adds up k numbers in another order
        check(router.plan(ids, left, k), routes, rank, ranks, k, 512, rtol=1e-6 + k * 2**-24)


@pytest.mark.parametrize("each_token", [True, False])
def test_512_drawn_experts(each_token):
    draw = Draw(np.arange(12).reshape(2, 6), 3)
    order = DrawnRouter(512, each_token=each_token, seed=1, index=0).order(draw)
    assert (order.sort(dim=1).values == torch.arange(512)).all()
    plans = [
        DrawnRouter(512, each_token=each_token, seed=1, index=0, rank=r, ranks=2).plan(None, None, 7, draw=draw)
        for r in range(2)
    ]
    counts = torch.bincount(order[:, :7].long().flatten(), minlength=512) * (1 if each_token else 12)
    assert [plan.count_E.tolist() for plan in plans] == [counts.tolist()] * 2
    assert [n for plan in plans for n in plan.chunks[0].rows.counts()] == counts.tolist()


def test_routers_share_keys_and_shuffles():
    ids, left = make_ids(2, 12)
    draw = Draw(np.arange(24).reshape(2, 12), 5)
    tables = [make_table(), make_table(16)]
    for shuffled in (False, True):
        group = GroupIds(ids, left)
        for table in tables:
            router = HashedRouter(table, rank=1, ranks=2, shuffled=shuffled)
            shared = router.plan(ids, left, 2, draw=draw, group=group)
            alone = router.plan(ids, left, 2, draw=draw)
            assert torch.equal(shared.chunks[0].rows.source_N, alone.chunks[0].rows.source_N)
            assert torch.equal(shared.chunks[0].weight_N, alone.chunks[0].weight_N)
            assert torch.equal(shared.count_E, alone.count_E)
        assert len(group._keys) == 1


def test_threads_plan_the_same_in_the_same_order(monkeypatch):
    ids, left = make_ids(2, 12)
    hashed = [HashedRouter(table, rank=1, ranks=2) for table in (make_table(), make_table(16), make_table(4))] * 3
    want = [router.plan(ids, left, 2) for router in hashed]
    monkeypatch.setattr(routers, "_THREADED", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = routers.plan_all(hashed, ids, left, 2)
    assert [plan.count_E.tolist() for plan in found] == [plan.count_E.tolist() for plan in want]
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one.chunks[0].rows.slot_N, other.chunks[0].rows.slot_N)
        assert torch.equal(one.chunks[0].weight_N, other.chunks[0].weight_N)


def test_experts_that_cannot_be_shared_out_are_refused():
    with pytest.raises(UserError, match=r"moe\.experts=8: must be a multiple of parallel\.expert_ranks=3"):
        HashedRouter(make_table(), rank=0, ranks=3)
