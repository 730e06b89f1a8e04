"""Use and likeness of experts against plain loops over a text, and the groups that follow."""

import itertools
import math

import numpy as np
import pytest
import torch

from foreroute.engine.compress import groups
from foreroute.engine.config import Builder, MoEConfig
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.tables import build_tables, row_frequency
from foreroute.engine.testing.routers import route_of

V, K = 9, 2
IDS = np.random.default_rng(0).integers(0, V, 300)


@pytest.fixture
def router():
    """Of five experts and a null one."""
    moe = MoEConfig(experts=5, null_experts=1, ngram=2, rows=40, builder=Builder.random)
    (table,) = build_tables(moe, V, IDS, num_tables=1, seed=3, cache_dir=None)
    return HashedRouter(table, experts=5)


def sets_of(router):
    """The experts of each token of the text."""
    ids_BQ, left_BC = torch.from_numpy(IDS)[None], torch.zeros(1, 1, dtype=torch.int64)
    return [set(row) - {5} for row in route_of(router, ids_BQ, left_BC, K).expert_TK.tolist()]


def test_uses_are_those_of_the_tokens(router):
    freq_r = row_frequency(router.table, IDS)
    want = [sum(e in chosen for chosen in sets_of(router)) for e in range(5)]
    assert groups.uses(router, freq_r, K).tolist() == want
    assert groups.uses(router, freq_r, 1).tolist() != want


def test_shared_use_is_that_of_the_tokens(router):
    found = groups.shared_use(router, row_frequency(router.table, IDS), K)
    sets = sets_of(router)
    for a in range(5):
        for b in range(5):
            both, either = (sum(test(e in chosen for e in (a, b)) for chosen in sets) for test in (all, any))
            assert found[a, b] == pytest.approx(both / either)


def test_outputs_are_compared_by_their_distance():
    y_ETD = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    found = groups.output_likeness(y_ETD)
    for a in range(3):
        for b in range(3):
            pairs = zip(y_ETD[a].flatten().tolist(), y_ETD[b].flatten().tolist(), strict=True)
            assert found[a, b] == pytest.approx(-sum((x - y) ** 2 for x, y in pairs), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("likeness", "group"), [([0.9, 0.1], [0, 0, 1, 1]), ([0.1, 0.9], [0, 1, 1, 0])])
def test_the_example(likeness, group):
    like_EE = np.eye(4)
    like_EE[1, [0, 2]], like_EE[3, [0, 2]] = likeness, [0.2, 0.3]
    found = groups.merged(np.array([5.0, 1, 4, 2]), like_EE, 2)
    assert found.leader_G.tolist() == [0, 2] and found.group_E.tolist() == group
    assert found.sizes == [2, 2]


@pytest.mark.parametrize("number", [2, 3, 5])
def test_of_all_groups_of_limited_size_the_most_alike_are_found(number):
    random = np.random.default_rng(number)
    use_E, like_EE = random.random(7), random.random((7, 7))
    found = groups.merged(use_E, like_EE, number)
    leaders = sorted(sorted(range(7), key=lambda e: -use_E[e])[:number])
    others = [e for e in range(7) if e not in leaders]
    most = math.ceil(7 / number) - 1
    ways = (way for way in itertools.product(range(number), repeat=len(others)) if max(map(way.count, way)) <= most)
    best = max(ways, key=lambda way: sum(like_EE[e, leaders[g]] for e, g in zip(others, way, strict=True)))
    assert found.leader_G.tolist() == leaders and found.group_E[others].tolist() == list(best)
    assert found.group_E[leaders].tolist() == list(range(number))


def test_the_most_used_are_kept():
    found = groups.kept(np.array([5.0, 1, 4, 1, 2]), 4)
    assert found.leader_G.tolist() == [0, 1, 2, 4] and found.group_E.tolist() == [0, 1, 2, groups.DROPPED, 3]
