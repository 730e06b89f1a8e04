"""The balance of a text against plain loops over its tokens, and against the rows that plans put on the wire."""

from collections import Counter

import numpy as np
import pytest
import torch

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.enums import Builder
from foreroute.engine.data.streams import Streams
from foreroute.engine.errors import UserError
from foreroute.engine.evaluation.table_balance import balances, unique_ngrams
from foreroute.engine.routing.tables import Table, build_tables
from foreroute.engine.testing.routers import hashed, plan_of, route_of

EXPERTS, SYMBOLS, PACK = 8, 9, 4


def make(builder=Builder.random, pack=None):
    ids = np.random.default_rng(0).integers(0, SYMBOLS, 900).astype(np.uint8)
    moe = MoEConfig(experts=EXPERTS, ngram=2, rows=32, builder=builder, pack=pack)
    return build_tables(moe, SYMBOLS, ids, num_tables=1, seed=1, cache_dir=None)[0]


def text(size=700):
    return (np.minimum(np.random.default_rng(3).zipf(1.5, size), SYMBOLS) - 1).astype(np.uint8)


def routed(table, ids, k):
    """Chosen experts of each token of a text."""
    stream = torch.from_numpy(ids.astype(np.int64))[None]
    left = torch.zeros(1, 1, dtype=torch.int64)
    return route_of(hashed(table), stream, left, k).expert_TK.tolist()


def spread(chosen, size):
    """Max / mean of the expert rows of neighbours of `size` experts."""
    count = Counter(expert // size for row in chosen for expert in row)
    return max(count.values()) / (sum(count.values()) / (EXPERTS // size))


@pytest.mark.parametrize(("builder", "pack"), [(Builder.random, None), (Builder.packed, PACK)])
def test_equals_plain_counting(builder, pack):
    table, ids = make(builder, pack), text()
    for found in balances(table, ids, (1, 2, 4, 8)):
        chosen = routed(table, ids, found.k)
        assert found.experts == pytest.approx(spread(chosen, 1))
        assert found.blocks == pytest.approx(spread(chosen, pack or EXPERTS))
        for ranks, on in found.ranks.items():
            size = EXPERTS // ranks
            homes = [{expert // size for expert in row} for row in chosen]
            assert on.load == pytest.approx(spread(chosen, size))
            assert on.touched == pytest.approx(sum(map(len, homes)) / len(homes))
            # the mean over all ranks that a token may lie on
            leaving = [len(home - {rank}) for home in homes for rank in range(ranks)]
            assert on.wire_rows == pytest.approx(sum(leaving) / len(leaving))


def test_equals_the_rows_that_plans_send():
    """Every rank has the same tokens, so the mean over ranks is exact."""
    table, ids, ranks = make(), text(60), 4
    stream = torch.from_numpy(ids.astype(np.int64)).expand(ranks, 1, -1)
    left = torch.zeros(ranks, 1, 1, dtype=torch.int64)
    for found in balances(table, ids, (ranks,)):
        plans = [plan_of(hashed(table, rank=r, ranks=ranks), stream, left, found.k) for r in range(ranks)]
        sent = sum(plan.wire_rows for plan in plans) / (ranks * ids.size)
        assert found.ranks[ranks].wire_rows == pytest.approx(sent)


def test_worked_example():
    order = torch.tensor([[0, 1, 2, 3], [2, 3, 0, 1]], dtype=torch.uint8)
    table = Table(order, None, ngram=1, vocab_size=2, seed=0, index=0, builder=Builder.packed, pack=2)
    first, _, third, _ = balances(table, np.array([0, 1], np.uint8), (2,))
    assert (first.experts, first.blocks) == (2.0, 1.0)
    assert (first.ranks[2].touched, first.ranks[2].wire_rows) == (1.0, 0.5)
    assert (third.ranks[2].touched, third.ranks[2].wire_rows) == (2.0, 1.0)


def test_ranks_that_cannot_share_the_experts_are_refused():
    with pytest.raises(UserError, match=r"moe\.experts=8: must be a multiple of parallel\.expert_ranks=3"):
        balances(make(), text(), (3,))


@pytest.mark.parametrize(("starts", "accumulation"), [([], 1), ([3, 40, 41, 77], 1), ([], 2)])
def test_distinct_ngrams_equal_sets_of_tuples(starts, accumulation):
    """A stream's first ids have 0 before them, and so has a document's."""
    ids, streams, segment = text(101), 4, 5
    cut = Streams(ids, streams, segment, 2, document_starts=np.array(starts, np.int64))
    found = unique_ngrams(cut, SYMBOLS, (1, 2, 3), accumulation=accumulation)
    length, own = len(ids) // streams, streams // accumulation
    for n in (1, 2, 3):
        shares = []
        for step in range((length - 1) // segment):
            first = step % accumulation * own
            grams = []
            for stream in range(first, first + own):
                for place in range(stream * length + step * segment, stream * length + (step + 1) * segment):
                    low = max([stream * length, *(start for start in starts if start <= place)])
                    grams.append(tuple(int(ids[at]) if at >= low else 0 for at in range(place - n + 1, place + 1)))
            shares.append(len(set(grams)) / len(grams))
        assert found[n] == pytest.approx(np.mean(shares), abs=1e-12)
    assert found[1] < found[2] < found[3] < 1
    assert unique_ngrams(cut, SYMBOLS, (2,), accumulation=accumulation, most=1) != pytest.approx({2: found[2]})
