"""Routers that draw experts anew at each forward pass, and shuffled keys, against plain loops over Python integers."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from foreroute.engine.config import MoEConfig
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.planned.fresh import FreshRouter
from foreroute.engine.routing.planned.stochastic import StochasticRouter
from foreroute.engine.routing.planned_router import Draw
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.routers import hashed, plan_of

E, NO_IDS = 6, torch.zeros(1, 1, 0, dtype=torch.int64)


def hash64(*parts):
    """Splitmix64's mixing function, part after part, on Python integers."""
    state, mask = 0, 2**64 - 1
    for part in parts:
        z = (state + int(part) + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        state = z ^ (z >> 31)
    return state


def draw_of(tokens, ranks=1, **options):
    return Draw(np.arange(tokens).reshape(ranks, -1), **{"index": 3, **options})


def router(each_token=True, *, seed=9, index=1, rank=0, ranks=1):
    kind = FreshRouter if each_token else StochasticRouter
    return kind(E, seed=seed, index=index).place(Mesh(rank, ranks, ranks))


def rows_of_tokens(plans, tokens):
    """Expert and weight of every row of the plans of all ranks, by token of the group."""
    found, local = [[] for _ in range(tokens)], E // len(plans)
    for rank, plan in enumerate(plans):
        (chunk,) = plan.chunks
        source = chunk.rows.source_N
        token_N = source if chunk.received_R is None else chunk.received_R[source]
        expert_N = torch.bucketize(torch.arange(len(token_N)), chunk.rows.offset_L, right=True)
        for token, expert, weight in zip(token_N.tolist(), expert_N.tolist(), chunk.weight_N.tolist(), strict=True):
            found[token].append((rank * local + expert, weight))
    return found


@pytest.mark.method
@pytest.mark.parametrize("k", [1, 4, E])
@pytest.mark.parametrize("each_token", [True, False])
def test_plans_equal_a_plain_loop_on_one_rank_and_on_two(each_token, k):
    tokens = 10
    for held_out, number in ((False, 0), (True, 1)):
        orders = [
            sorted(range(E), key=lambda e, t=t: hash64(7, 9, 1, held_out, 3, number, t * each_token, e))
            for t in range(tokens)
        ]
        for ranks in (1, 2):
            draw = draw_of(tokens, ranks, held_out=held_out, number=number)
            routers = [router(each_token, rank=r, ranks=ranks) for r in range(ranks)]
            plans = [plan_of(each, NO_IDS, NO_IDS, k, draw) for each in routers]
            found = rows_of_tokens(plans, tokens)
            for order, row in zip(orders, found, strict=True):
                assert sorted(expert for expert, _ in row) == sorted(order[:k])
                assert [weight for _, weight in row] == pytest.approx([1 / k] * k)
            assert all(plan.count_E.sum() == tokens * k for plan in plans)


@pytest.mark.method
def test_fresh_is_uniform_and_new_each_time():
    tokens, k = 6000, 2
    draw = draw_of(tokens)
    order = router().order(draw)
    counts = Counter(map(tuple, order[:, :k].sort(dim=1).values.tolist()))
    expected = tokens / 15  # sets of 2 of 6 experts
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == 15 and chi_square < 36.1  # 0.1 % point of 14 degrees of freedom
    assert torch.equal(order, router().order(draw))
    others = [replace(draw, index=4), replace(draw, held_out=True), replace(draw, number=1)]
    orders = [router().order(other) for other in others]
    orders += [router(index=2).order(draw), router(seed=8).order(draw)]
    for other in orders:
        same = (other == order).all(dim=1).float().mean()
        assert same < 0.01  # by chance 1 / 720


def test_a_biased_draw_is_seen():
    """Negative control of the chi-square bound: always taking expert 0 first."""
    order = router().order(draw_of(6000)).sort(dim=1, stable=True).values
    counts = Counter(map(tuple, order[:, :2].tolist()))
    assert len(counts) == 1


@pytest.mark.method
def test_stochastic_draws_one_order_for_all_and_every_expert_in_turn():
    first = [router(False).order(draw_of(8, index=step))[:, 0] for step in range(3000)]
    assert all(len(order) == 1 for order in first)
    counts = torch.bincount(torch.cat(first).long(), minlength=E)
    assert ((counts - 500).abs() < 4 * (3000 * 5 / 36) ** 0.5).all()  # four standard deviations


def tables():
    ids = np.random.default_rng(0).integers(0, 8, 500).astype(np.uint8)
    moe = MoEConfig(experts=E, ngram=2, rows=64)
    return build_tables(moe, 8, ids, num_tables=2, seed=1, cache_dir=None)


IDS = torch.from_numpy(np.random.default_rng(1).integers(0, 8, (2, 1, 20)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_shuffled_keys_are_the_same_keys_at_other_places(ranks):
    ids_PBQ = IDS.reshape(ranks, -1, 20)
    left_PBC = torch.zeros(*ids_PBQ.shape[:2], 1, dtype=torch.int64)
    draw = draw_of(40, ranks)
    place_T = sorted(range(40), key=lambda t: hash64(8, 1, False, 3, 0, t))
    assert place_T != list(range(40))
    for table in tables():  # the same tokens lend their keys in every layer
        row_T = torch.cat([table.rows_of(ids, left).reshape(-1) for ids, left in zip(ids_PBQ, left_PBC, strict=True)])
        wanted = [table.order_rE[row_T[place], :2].tolist() for place in place_T]
        routers = [hashed(table, rank=r, ranks=ranks, shuffled=True) for r in range(ranks)]
        plans = [plan_of(r, ids_PBQ, left_PBC, 2, draw) for r in routers]
        found = rows_of_tokens(plans, 40)
        assert [sorted(e for e, _ in row) for row in found] == [sorted(row) for row in wanted]
        own = [plan_of(hashed(table, rank=r, ranks=ranks), ids_PBQ, left_PBC, 2) for r in range(ranks)]
        assert torch.equal(plans[0].count_E, own[0].count_E)
        assert rows_of_tokens(own, 40) != found


def test_what_is_drawn_needs_a_draw():
    with pytest.raises(ValueError, match="need a draw"):
        plan_of(router(), NO_IDS, NO_IDS, 2)
    with pytest.raises(ValueError, match="need a draw"):
        plan_of(hashed(tables()[0], shuffled=True), IDS, IDS[..., :1], 2)


def test_plans_are_for_the_exchange_of_tokens_in_one_part_unless_asked():
    draw, ids = draw_of(10, 2), torch.zeros(2, 1, 5, dtype=torch.int64)
    table = build_tables(MoEConfig(experts=E, ngram=1, rows=9), 9, np.arange(9), num_tables=1, seed=1, cache_dir=None)[
        0
    ]
    for planned in (router(ranks=2), hashed(table, ranks=2)):
        (chunk,) = plan_of(planned, ids, ids[..., :0], 2, draw).chunks
        assert chunk.send is not None and chunk.received_R is not None
        (chunk,) = plan_of(planned, ids, ids[..., :0], 2, draw, gather=True).chunks
        assert chunk.send is None and chunk.received_R is None
