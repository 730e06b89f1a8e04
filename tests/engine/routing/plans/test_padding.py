"""Padded plans: shapes that the bounds say, and the same rows, weights and order in them."""

from itertools import pairwise

import pytest
import torch

from foreroute.engine.config import MoEConfig, RouteWeights
from foreroute.engine.errors import RunFailed
from foreroute.engine.routing.plans.padding import RowBounds, pad_plan
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.routers import hashed, plan_of

EXPERTS, SYMBOLS, TOKENS, K, RANKS = 8, 9, 23, 3, 4
BOUNDS = RowBounds(pair_rows=TOKENS, expert_rows=2 * RANKS * TOKENS)


def plan(rank, *, ranks=RANKS, seed=0, weights=RouteWeights.table, **options):
    text = torch.randint(0, SYMBOLS, (900,), generator=torch.Generator().manual_seed(1)).to(torch.uint8).numpy()
    moe = MoEConfig(experts=EXPERTS, ngram=2, rows=32)
    (table,) = build_tables(moe, SYMBOLS, text, num_tables=1, seed=1, cache_dir=None)
    router = hashed(table, rank=rank, ranks=ranks, weights=weights)
    ids = torch.randint(0, SYMBOLS, (ranks, 1, TOKENS), generator=torch.Generator().manual_seed(seed))
    return plan_of(router, ids, ids[..., :1], K, **options)


def sums(rows, weight_N):
    """For each input row what it adds up, in order: the rows that its experts read, the experts and the weights."""
    expert_N, starts = rows.expert_N().tolist(), [*rows.slot_offset_R.tolist(), rows.num_rows]
    return [
        [(rows.source_N[n].item(), expert_N[n], weight_N[n].item()) for n in rows.slot_N[start:end].tolist()]
        for start, end in pairwise(starts)
    ]


@pytest.mark.parametrize("chunks", [1, 3])
def test_rows_keep_their_sums_and_splits_become_equal(chunks):
    for rank in range(RANKS):
        dynamic = plan(rank, chunks=chunks)
        padded = pad_plan(dynamic, BOUNDS)
        assert torch.equal(padded.count_E, dynamic.count_E) and padded.num_tokens == dynamic.num_tokens
        for old, new in zip(dynamic.chunks, padded.chunks, strict=True):
            new.rows.validate()
            assert new.send_splits == new.recv_splits == (TOKENS,) * RANKS
            assert new.send.num_rows == new.rows.num_inputs == RANKS * TOKENS
            assert new.rows.num_rows == new.weight_N.numel() == BOUNDS.expert_rows
            # received rows, rank by rank in their old order
            places = [q * TOKENS + i for q, count in enumerate(old.recv_splits) for i in range(count)]
            assert new.received_R[places].tolist() == old.received_R.tolist()
            want, got = sums(old.rows, old.weight_N), sums(new.rows, new.weight_N)
            assert [got[r] for r in places] == [
                [(places[source], expert, weight) for source, expert, weight in row] for row in want
            ]
            assert all(not got[r] for r in set(range(RANKS * TOKENS)) - set(places))
            # rows that are sent, and what comes back for each token
            places = [q * TOKENS + i for q, count in enumerate(old.send_splits) for i in range(count)]
            assert new.send.source_N[places].tolist() == old.send.source_N.tolist()
            starts = [*old.send.slot_offset_R.tolist(), old.send.num_rows]
            padding = RANKS * TOKENS - old.send.num_rows
            assert new.send.slot_offset_R.tolist() == [start + padding for start in starts[:-1]]
            assert new.send.slot_N[padding:].tolist() == [places[n] for n in old.send.slot_N.tolist()]
            assert sorted(new.send.slot_N.tolist()) == list(range(RANKS * TOKENS))


def test_with_all_rows_everywhere_only_expert_rows_are_padded():
    dynamic = plan(2, gather=True)
    padded = pad_plan(dynamic, BOUNDS)
    (old,), (new,) = dynamic.chunks, padded.chunks
    new.rows.validate()
    assert new.rows.num_rows == BOUNDS.expert_rows > old.rows.num_rows
    assert sums(new.rows, new.weight_N) == sums(old.rows, old.weight_N)
    assert new.send_splits == old.send_splits and new.send is None


def test_one_rank_needs_no_padding():
    alone = plan(0, ranks=1)
    assert pad_plan(alone, RowBounds(1, 1)) is alone


def test_more_rows_than_a_bound_says_are_refused():
    dynamic = plan(1)
    rows, most = dynamic.chunks[0].rows.num_rows, max(*dynamic.send_splits, *dynamic.recv_splits)
    pad_plan(dynamic, RowBounds(most, rows))
    with pytest.raises(RunFailed, match=f"a plan has {rows} expert rows: its bound is {rows - 1}"):
        pad_plan(dynamic, RowBounds(most, rows - 1))
    with pytest.raises(RunFailed, match=f"a plan has {most} rows from one rank to another: its bound is {most - 1}"):
        pad_plan(dynamic, RowBounds(most - 1, rows))


def test_live_weights_are_refused():
    with pytest.raises(RunFailed, match=r"moe\.weights=live cannot be padded"):
        pad_plan(plan(1, weights=RouteWeights.live), BOUNDS)
