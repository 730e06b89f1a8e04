"""Loaders of several ranks: what differs is named before a plan is used, and all stop behind the same micro-batch."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foreroute.engine.config import MoEConfig
from foreroute.engine.data.documents import NO_STARTS, ends_at
from foreroute.engine.data.loader import PlannedLoader
from foreroute.engine.data.plan_agreement import Agreement
from foreroute.engine.data.planned_batches import group_batch, plan_batch, share_ids
from foreroute.engine.data.streams import Streams
from foreroute.engine.errors import RunFailed
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.ranks import run_threads
from foreroute.engine.testing.routers import hashed, hashed_of, route_of

RANKS, GROUP, STREAMS, SEGMENT, SYMBOLS = 4, 2, 8, 6, 9
TEXT = np.random.default_rng(0).integers(0, SYMBOLS, 900).astype(np.uint8)


def routers(mesh, seed=1):
    moe = MoEConfig(experts=4, ngram=2, rows=32)
    tables = build_tables(moe, SYMBOLS, TEXT, num_tables=2, seed=seed, cache_dir=None)
    return hashed_of(tables, mesh)


def start(host, group_host=None, *, text=TEXT, starts=NO_STARTS, k=lambda step: 2, seed=1, steps=range(9), spoil=None):
    """A loader of one rank; with a group_host it reads its own streams only."""
    mesh = Mesh(host.rank, RANKS, GROUP)
    streams = Streams(text, STREAMS, SEGMENT, 1, document_starts=starts)
    own_routers = routers(mesh, seed)

    def batch(rank, step, micro):
        return streams.batch(step, streams.streams_of(rank, micro, world=RANKS, accumulation=2))

    def make_batch(step, micro):
        if group_host is None:
            return group_batch([batch(r, step, micro) for r in mesh.ep_ranks], mesh.ep_rank)
        return share_ids(group_batch([batch(mesh.rank, step, micro)]), group_host)

    def planned(step, micro):
        batch = plan_batch(make_batch(step, micro), k(step), own_routers)
        return batch if spoil is None else spoil(batch)

    batches, agreement = SimpleNamespace(planned=planned), Agreement(host, mesh, own_routers)
    return PlannedLoader(batches, steps=steps, accumulation=2, prefetch=2, agreement=agreement)


def take(host, number=6, **options):
    loader = start(host, **options)
    try:
        return [loader.next()[0] for _ in range(number)]
    finally:
        loader.close()
        assert not loader._worker.is_alive()


def test_equal_ranks_go_on():
    for rank, found in enumerate(run_threads(take, RANKS)):
        assert [planned.batch.index for planned in found] == [0, 0, 1, 1, 2, 2]
        assert found[0].batch.stream_B.tolist() == [2 * rank]
        tokens = found[1].routing.token_T.tolist()
        first = 2 * (rank - rank % GROUP) + 1  # micro-batch 1 of the group's first rank
        assert tokens == [s * SEGMENT + q for s in (first, first + 2) for q in range(SEGMENT)]
        # unless asked for the other exchange: each rank gets the rows that it needs
        assert all(len(plan.chunks) == 1 and plan.chunks[0].send is not None for plan in found[0].routing.plans)


def test_two_ranks_with_512_experts():
    """Numbers of experts beyond a byte; what one sends the other receives, and each expert gets its tokens' rows."""

    def plan(host):
        mesh = Mesh(host.rank, 2, 2)
        moe = MoEConfig(experts=512, ngram=2, rows=32)
        (table,) = build_tables(moe, SYMBOLS, TEXT, num_tables=1, seed=1, cache_dir=None)
        router = hashed(table, rank=host.rank, ranks=2)
        streams = Streams(TEXT, STREAMS, SEGMENT, 1)
        own = streams.batch(0, streams.streams_of(host.rank, 0, world=2, accumulation=1))
        group = share_ids(group_batch([own]), host)
        planned = plan_batch(group, 3, [router])
        Agreement(host, mesh, [router]).check(0, 0, 3, group, planned.routing.plans)
        (found,) = planned.routing.plans
        return found, torch.bincount(route_of(router, own.ids_BQ, own.left_BC, 3).expert_TK.flatten(), minlength=512)

    (one, own), (other, others) = run_threads(plan, 2)
    assert one.send_splits[1] == other.recv_splits[0] and other.send_splits[0] == one.recv_splits[1]
    wanted = (own + others).tolist()
    assert wanted[256:] != [0] * 256
    assert one.count_E.tolist() == other.count_E.tolist() == wanted
    assert one.chunks[0].rows.counts() + other.chunks[0].rows.counts() == wanted


def test_ranks_that_close_at_different_speeds_do_not_wait_for_ever():
    """One rank's thread may be far ahead of another's when all stop behind the same step."""
    assert all(len(found) == 3 for found in run_threads(lambda host: take(host, 3), RANKS))


@pytest.mark.parametrize(
    "rank,change,message",
    [
        (
            2,
            {"k": lambda step: 2 + (step == 1)},
            (
                "step 1, micro-batch 0: the ranks differ in their number of active experts k: rank 2 has 3, the other 3"
                " have 2"
            ),
        ),
        (3, {"seed": 2}, "step 0, micro-batch 0: the ranks differ in their tables: rank 3 has digest"),
        (
            1,
            {"text": TEXT[::-1].copy()},
            "step 0, micro-batch 0: the ranks differ in their token ids: rank 0 has digest",
        ),
        (
            3,
            {"text": TEXT[::-1].copy()},
            "step 0, micro-batch 0: the ranks differ in their token ids: rank 2 has digest",
        ),
        (
            2,
            {"starts": ends_at(TEXT, 4)},
            "step 0, micro-batch 0: the ranks differ in their token ids: rank 2 has digest",
        ),
        (2, {"steps": range(1, 9)}, "the ranks differ in their step: rank 2 has 1, the other 3 have 0"),
    ],
)
def test_a_rank_that_differs_is_named_on_every_rank(rank, change, message):
    found = run_threads(lambda host: take(host, **(change if host.rank == rank else {})), RANKS)
    for other, problem in enumerate(found):
        assert isinstance(problem, RunFailed) and problem.everywhere
        if other != rank:  # the odd one names its own step
            assert message in str(problem)


def test_other_splits_are_seen():
    """Negative control of the last comparison: ids and tables agree and the plan is still another one."""

    def spoil(planned):
        first, plan = planned.routing.plans
        sent = plan.send_splits
        chunk = replace(plan.chunks[0], send_splits=(sent[0] - 1, sent[1] + 1))
        routing = replace(planned.routing, plans=(first, replace(plan, chunks=(chunk,))))
        return replace(planned, routing=routing)

    found = run_threads(lambda host: take(host, spoil=spoil if host.rank == 3 else None), RANKS)
    for problem in found:
        assert "rank 3 plans to send other numbers of rows to rank 2 than that one expects" in str(problem)


@pytest.mark.parametrize("starts", [NO_STARTS, ends_at(TEXT, 4)], ids=["one document", "documents"])
def test_ids_by_exchange_equal_ids_from_the_corpus(starts):

    def exchange(host):
        return take(host, group_host=Half(host), starts=starts)

    def read(host):
        return take(host, starts=starts)

    names = ("ids_PBQ", "left_PBC", "stream_PB", *["new_document_PBX"] * bool(starts.size))
    for by_exchange, by_corpus in zip(run_threads(exchange, RANKS), run_threads(read, RANKS), strict=True):
        for a, b in zip(by_exchange, by_corpus, strict=True):
            assert (a.group.new_document_PBX is None) == (not starts.size)
            for name in names:
                got, want = getattr(a.group, name), getattr(b.group, name)
                assert got.dtype == want.dtype and torch.equal(got, want)
            assert a.routing.plans[1].send_splits == b.routing.plans[1].send_splits


class Half(CpuGroup):
    """The expert group of a rank, over connections of all ranks."""

    def __init__(self, host):
        self.host, self.rank, self.ranks = host, host.rank % GROUP, GROUP

    def all_gather(self, values):
        first = self.host.rank - self.rank
        return self.host.all_gather(values)[first : first + GROUP]


@pytest.mark.parametrize(
    ("rank", "column", "message"),
    [
        (11, 0, "step: rank 11 has 1, the other 11 have 0"),
        (11, 4, "token ids: rank 10 has digest 00000000, rank 11 has digest 00000001"),
    ],
)
def test_all_of_many_ranks_are_compared(rank, column, message):
    """More ranks than a rank tells numbers: 12 in groups of 2, of which each tells 5 + 2 x 2."""
    found = np.zeros((12, 9), np.int64)
    agreement = Agreement(CpuGroup(), Mesh(0, 12, GROUP), None)
    agreement._compare(found, "here")
    found[rank, column] = 1
    with pytest.raises(RunFailed, match=f"here: the ranks differ in their {message}"):
        agreement._compare(found, "here")
