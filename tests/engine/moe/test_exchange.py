"""What the exchange refuses; that it moves rows rightly is shown in test_layer_on_ranks.py."""

import numpy as np
import pytest
import torch
from torch import distributed as dist

from foreroute.engine.config import KernelsConfig, MoEConfig, ParallelConfig
from foreroute.engine.config.enums import ExchangeKind
from foreroute.engine.moe.exchange import Exchange, Local, build_exchange
from foreroute.engine.moe.experts import Experts
from foreroute.engine.routing.plan import Route
from foreroute.engine.routing.plans import live_plan
from foreroute.engine.routing.plans.exchange_choice import use_gather
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.routers import hashed, plan_of


class NoWire:
    """Refuses to be used."""

    ranks = 2


def make_plan(ranks, **options):
    text = np.random.default_rng(0).integers(0, 9, 900).astype(np.uint8)
    moe = MoEConfig(experts=8, ngram=2, rows=32)
    table = build_tables(moe, 9, text, num_tables=1, seed=1, cache_dir=None)[0]
    ids = torch.randint(0, 9, (ranks, 1, 23), generator=torch.Generator().manual_seed(5))
    return plan_of(hashed(table, ranks=ranks), ids, ids[..., :1], 2, **options)


@pytest.mark.parametrize("options", [{}, {"gather": True}, {"chunks": 4}])
def test_a_plan_for_others_is_refused(options):
    exchange = build_exchange(NoWire(), ParallelConfig())
    assert isinstance(exchange, Exchange)
    x_TD = torch.zeros(23, 4)
    with pytest.raises(ValueError, match="for an expert group of 4 ranks: this one has 2"):
        exchange.dispatch(x_TD, make_plan(4, **options))
    with pytest.raises(ValueError, match="for an expert group of 2 ranks: this one has 1"):
        Local().dispatch(x_TD, make_plan(2, **options))
    with pytest.raises(ValueError, match="x_TD has 5 rows: the plan is for 23 tokens"):
        exchange.dispatch(x_TD[:5], make_plan(2, **options))
    with pytest.raises(ValueError, match="x_TD has 5 rows: the plan is for 23 tokens"):
        Local().dispatch(x_TD[:5], make_plan(1))


def test_a_plan_in_parts_for_others_is_refused():
    exchange = build_exchange(NoWire(), ParallelConfig())
    experts, x_TD = Experts(4, MoEConfig(experts=8, expert_width=6), KernelsConfig()), torch.zeros(23, 4)
    with pytest.raises(ValueError, match="for an expert group of 4 ranks: this one has 2"):
        experts(x_TD, make_plan(4, chunks=4), None, exchange=exchange)
    with pytest.raises(ValueError, match="x_TD has 5 rows: the plan is for 23 tokens"):
        experts(x_TD[:5], make_plan(2, chunks=4), None, exchange=exchange)


def test_one_rank_exchanges_nothing():
    comm = type("ExpertGroupComm", (), {"ranks": 1})()
    exchange = build_exchange(comm, ParallelConfig())
    x_TD = torch.zeros(23, 4)
    plan = make_plan(1)
    assert isinstance(exchange, Local)
    assert exchange.dispatch(x_TD, plan) is x_TD and exchange.combine(x_TD, plan) is x_TD
    assert plan.wire_rows == plan.wire_bytes(4, 4) == 0


def raises(rank):
    if rank == 1:
        raise ValueError("no such expert")
    dist.barrier()


def test_a_rank_that_raises_is_named():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2:.*ValueError: no such expert"):
        run_ranks(raises, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_live_router_gathers_when_the_model_of_times_says_so(dtype, monkeypatch):
    """As loader and certificate decide, from the same sizes: 24 tokens, 6 wide, 8 experts on 2 ranks."""
    asked = []
    monkeypatch.setattr(live_plan, "build_live_plan", lambda *_, **how: asked.append(how))
    parallel = ParallelConfig(
        exchange=ExchangeKind.auto, link_gb_per_s=1e-3, message_us=0, memory_gb_per_s=0.01, chunks=3
    )
    for k in range(1, 9):
        route = Route(torch.zeros(24, k, dtype=torch.int64), torch.ones(24, k))
        live_plan.plan_live(route, 8, torch.zeros(24, 6, dtype=dtype), k, NoWire(), parallel)
    want = [
        use_gather(parallel, experts=8, ranks=2, k=k, tokens=24, width=6, itemsize=dtype.itemsize) for k in range(1, 9)
    ]
    assert asked == [{"gather": gather, "chunks": 3} for gather in want]
    assert set(want) == {False, True}
