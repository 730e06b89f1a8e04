"""Rows of n-gram tables as a rank alone plans them, against all ranks that ask each other."""

from dataclasses import replace

import torch

from foreroute.engine.config import NgramTablesConfig
from foreroute.engine.data.planned_batches import TrainingBatches
from foreroute.engine.ngram_tables.tables import table_keys
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.replay.row_requests import without_others
from foreroute.engine.routing.plans.row_plan import RowsPlan
from foreroute.engine.testing.ranks import run_threads
from tests.engine.replay.small_run import MICRO, SYMBOLS, WORLD, make

STEPS = 3, 4


def batches(rank, hosts=None):
    layout, ids, _ = make()
    config = replace(layout.config, ngram_tables=NgramTablesConfig(rows=9, heads=2, layers=[0, 1]))
    layout, keys = replace(layout, config=config), table_keys(config.ngram_tables, SYMBOLS, 1)
    hosts = hosts or CpuGroup()
    return TrainingBatches(config, layout.read(ids), layout.mesh(rank), None, table_keys=keys, planning=hosts)


def planned(of_rank):
    """Plan some steps; return the first micro-batches' plans and where each token reads."""
    found = [of_rank.planned(step, micro).routing for step in STEPS for micro in range(MICRO)]
    return [plan for routing in found for plan in routing.row_plans], [at for r in found for at in r.landed_BQH]


def same(plan, other):
    names = (name for name in RowsPlan.__slots__ if name != "ahead")
    pairs = [(getattr(plan, name), getattr(other, name)) for name in names]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_a_rank_alone_plans_the_rows_that_all_ranks_agree_on():
    together = run_threads(lambda hosts: planned(batches(hosts.rank, hosts)), WORLD)
    for rank, (plans, places) in enumerate(together):
        alone, alone_places = planned(without_others(batches(rank)))
        assert len(alone) == 2 * len(STEPS) and len(plans) == len(alone)
        assert all(map(same, alone, plans)) and all(map(torch.equal, alone_places, places))
    other, _ = planned(without_others(batches(1)))
    assert not any(map(same, other, together[0][0]))
