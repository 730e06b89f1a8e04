"""Plans of table rows: what is sent, where it lands and how gradients are added up, against loops over all ranks."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.routing.plans.row_plan import TableRows, distinct_rows, plan_rows
from foreroute.engine.testing.ranks import run_ranks, run_threads

B, Q = 2, 5


@dataclass(frozen=True)
class Squares:
    """Keys whose rows follow from single ids: heads h = 0, 1, .. read row (id**2 + h) mod rows."""

    rows: int
    heads: int
    context: int = 0
    whole: bool = False

    def rows_of(self, ids_BQ: Tensor, left_BC: Tensor, new_document_BX: Tensor | None = None) -> Tensor:
        return (ids_BQ[..., None] ** 2 + torch.arange(self.heads)) % self.rows


TABLES = Squares(23, 2), Squares(7, 1)


def passes(rank: int, count: int = 2) -> list[SimpleNamespace]:
    ids = np.random.default_rng(rank).integers(0, 40, (count, B, Q))
    left_BC = torch.zeros(B, 0, dtype=torch.int64)
    return [SimpleNamespace(ids_BQ=torch.from_numpy(part), left_BC=left_BC, new_document_BX=None) for part in ids]


def check(found: list[list[TableRows]], ranks: int) -> None:
    """Compare the plans of all ranks with what each rank's tokens read."""
    for y, keys in enumerate(TABLES):
        plans = [rank_found[0].plans[y] for rank_found in found]
        read = [[keys.rows_of(ids.ids_BQ, ids.left_BC) for ids in passes(rank)] for rank in range(ranks)]
        wanted = [sorted({row for rows in of_rank for row in rows.flatten().tolist()}) for of_rank in read]
        for owner, plan in enumerate(plans):
            lists = [[row // ranks for row in rows if row % ranks == owner] for rows in wanted]
            assert plan.send_S.tolist() == [row for rows in lists for row in rows]
            assert plan.send_splits == tuple(map(len, lists))
            assert plan.touched_U.tolist() == sorted({row for rows in lists for row in rows})
            places = [[s for s, row in enumerate(plan.send_S.tolist()) if row == u] for u in plan.touched_U.tolist()]
            order, begins = plan.order_S.tolist(), plan.offset_U.tolist()
            assert [order[a:b] for a, b in zip(begins, [*begins, len(order)][1:], strict=True)] == places
        for rank, of_rank in enumerate(read):
            assert plans[rank].recv_splits == tuple(plan.send_splits[rank] for plan in plans)
            landed = []  # global rows, in the order in which they land
            for owner, plan in enumerate(plans):
                begin = sum(plan.send_splits[:rank])
                local = plan.send_S[begin : begin + plan.send_splits[rank]]
                landed += (local * ranks + owner).tolist()
            for table_rows, rows_BQH in zip(found[rank], of_rank, strict=True):
                assert torch.equal(torch.tensor(landed)[table_rows.landed_BQH[y]], rows_BQH)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_plans_equal_loops(ranks):
    found = run_threads(lambda hosts: plan_rows(TABLES, passes(hosts.rank), hosts), ranks)
    check(found, ranks)
    assert all(
        len(table_rows.plans) == (2, 0)[number] for of_rank in found for number, table_rows in enumerate(of_rank)
    )
    # negative control: another rank's plan
    if ranks > 1:
        other = [[first._replace(plans=found[0][0].plans), *rest] for first, *rest in found]
        with pytest.raises(AssertionError):
            check(other, ranks)


def plan(rank: int) -> list[TableRows]:
    from torch import distributed as dist

    from foreroute.engine.parallel.cpu_group import GlooGroup

    return plan_rows(TABLES, passes(rank), GlooGroup(dist.group.WORLD))


@pytest.mark.dist
def test_plans_over_gloo_equal_loops():
    check(run_ranks(plan, 3), 3)


def test_the_example():
    found = distinct_rows(np.array([4, 7, 4, 1]), 10, 2)
    assert found.local_R.tolist() == [2, 0, 3] and found.splits == (1, 2) and found.place.tolist() == [0, 2, 0, 1]


def test_no_tables_ask_nothing():
    class Silent(CpuGroup):
        ranks = 2

        def all_gather(self, values):
            raise AssertionError("asked")

    assert plan_rows((), passes(0), Silent()) == [TableRows((), ())] * 2


def test_a_rank_may_read_nothing_of_an_owner():
    """Row 0 alone: of the three ranks only the first one sends."""
    zeros = [replace_ids(ids, torch.zeros(B, Q, dtype=torch.int64)) for ids in passes(0)]
    found = run_threads(lambda hosts: plan_rows([Squares(9, 1)], zeros, hosts), 3)
    plans = [of_rank[0].plans[0] for of_rank in found]
    assert [plan.send_splits for plan in plans] == [(1, 1, 1), (0, 0, 0), (0, 0, 0)]
    assert [plan.recv_splits for plan in plans] == [(1, 0, 0)] * 3
    assert [plan.touched_U.tolist() for plan in plans] == [[0], [], []]
    assert plans[0].order_S.tolist() == [0, 1, 2] and plans[0].offset_U.tolist() == [0]


def replace_ids(ids: SimpleNamespace, ids_BQ: Tensor) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(ids), "ids_BQ": ids_BQ})
