"""What bench_exchange rests on: bytes by plain counting, the meter, and systems that compute the same."""

import json

import numpy as np
import pytest
import torch
from torch import distributed as dist

from benchmarks.models.traffic import Meter
from benchmarks.systems import exchange_rank
from benchmarks.systems.exchange_problem import BUILDERS, QUICK, Problem, autoep_bytes, moe_bytes, planned_bytes
from foreroute.engine.config import MoEConfig
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.ranks import run_ranks

SYMBOLS = 40


def problem(tables, ranks, pack=8):
    """Zipf-like text on some ranks."""
    draws = np.random.default_rng(2).zipf(1.2, 30_000 + ranks * QUICK.tokens)
    ids = (np.minimum(draws, SYMBOLS) - 1).astype(np.uint8)
    builder = BUILDERS[tables]
    moe = MoEConfig(experts=16, ngram=2, rows=4096, builder=builder, pack=pack if tables == "packed" else None)
    built = build_tables(moe, SYMBOLS, ids, num_tables=QUICK.layers, seed=1, cache_dir=None)
    own = torch.from_numpy(ids[30_000:].astype(np.int64)).view(ranks, 1, -1)
    return Problem(QUICK, built, own, torch.zeros(ranks, 1, 1, dtype=torch.int64))


def counted(given, per_node):
    """Numbers sent (ours left, ours crossed, AutoEP's left, AutoEP's crossed) in one direction, token by token."""
    found = np.zeros(4, int)
    size = 16 // given.ranks
    for layer in given.routes:
        for rank, route in enumerate(layer):
            for chosen in route.expert_TK.tolist():
                homes = [expert // size for expert in chosen]
                far = [home for home in homes if home // per_node != rank // per_node]
                found += [len({*homes} - {rank}), len({*far}), sum(h != rank for h in homes), len(far)]
    return found * QUICK.width


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (4, 2), (8, 4)])
@pytest.mark.parametrize("tables", BUILDERS)
def test_bytes_equal_plain_counting(tables, ranks, per_node):
    given = problem(tables, ranks)
    ours, autoep = planned_bytes(given, per_node), autoep_bytes(given, per_node)
    left, crossed, every_left, every_crossed = counted(given, per_node) * 4 * 4  # fp32, four trips
    assert ours == (left, crossed)
    counts = QUICK.layers * 16 * 4  # all ranks tell one rank how many rows its experts will get
    assert autoep.left == every_left + counts * (ranks - 1)
    assert autoep.crossed == every_crossed + counts * (ranks - per_node)
    assert moe_bytes(given, per_node).left > every_left  # padded


def test_the_share_of_the_bytes_on_four_ranks():
    """8 of 16 experts: a token needs 3.85 of 4 ranks on average when spread, 2 when packed, instead of 8 rows."""
    spread, packed = (problem(tables, 4) for tables in ("spread", "packed"))
    ours, autoep = planned_bytes(spread, 2), autoep_bytes(spread, 2)
    assert 0.46 < ours.left / autoep.left <= 0.49 and ours.crossed / autoep.crossed <= 0.49
    left, crossed, every_left, every_crossed = counted(packed, 2)
    assert (left, crossed) == (every_left / 4, every_crossed / 4)
    assert planned_bytes(packed, 2).left / autoep_bytes(packed, 2).left <= 0.26


def metered(rank):
    """What steps of two ranks see, and the bytes that a meter counts."""
    rows, received = torch.ones(3, 5), torch.full((2 + 2 * rank, 5), 7.0)
    counts, told = torch.tensor([rank, 10 + rank]), torch.zeros(2, dtype=torch.int64)
    sent, got = ([1, 2], [1, 1]) if rank == 0 else ([1, 2], [2, 2])
    found = []

    def step():
        largest = torch.tensor(rank)
        work = dist.all_to_all_single(received, rows, got, sent, async_op=True)
        dist.all_to_all_single(told, counts)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        work.wait()
        found.append((float(received.sum()), told.tolist(), int(largest)))

    meter = Meter(per_node=1)
    plain = dist.all_to_all_single
    with meter.on(record=True) as recorded:
        step()
    counted, muted, replay = meter.kinds(step, recorded.calls)
    for kind in (counted, replay, muted):
        kind()
        if kind is not replay:
            found.append((meter.traffic.left_bytes, meter.traffic.crossed_bytes))
        told.zero_()
    near = Meter(per_node=2)
    with near.on() as traffic:
        step()
    assert dist.all_to_all_single is plain and not traffic.calls
    return found, len(recorded.calls), (traffic.left_bytes, traffic.crossed_bytes)


@pytest.mark.dist
def test_the_meter_counts_mutes_and_replays():
    for rank, (found, calls, near) in enumerate(run_ranks(metered, 2)):
        real = (float(5 * (2 + 2 * rank)), [10 * rank, 10 * rank + 1], 1)
        left = (1 if rank else 2) * 5 * 4 + 8  # rows to the other rank, and one count
        assert found[0] == found[1] == real  # recorded, counted
        assert found[2] == (left, left)
        assert found[3] == (0.0, *real[1:])  # muted: rows are zeros, numbers as they were
        assert found[4] == (left, left)
        assert calls == 3 and near == (left, 0)


def test_a_difference_between_systems_is_refused():
    truth = {"out": torch.randn(1024, 8), "dw1": torch.randn(64, 8)}
    exchange_rank.check({"ours": truth, "moe": {k: v.clone() for k, v in truth.items()}})
    for key, row in (("out", 3), ("dw1", 5)):
        wrong = {k: v.clone() for k, v in truth.items()}
        wrong[key][row] += 0.1 * torch.randn(8)
        with pytest.raises(RuntimeError, match=rf"NOT TIMED: moe differs from ours in {key} by"):
            exchange_rank.check({"ours": truth, "moe": wrong})


@pytest.mark.slow
def test_bench_exchange(run):
    code, out, err = run("bench_exchange", "--quick", "--rounds", "1")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result) == ["bytes_ratio", "step_ratio", "live_ratio", "hidden_fraction", "planned_equals_measured"]
    assert list(result["step_ratio"]) == ["loopback", "1gbit", "200mbit", "200mbit_packed"]
    assert result["live_ratio"]["loopback"] > 0
    assert result["bytes_ratio"]["spread"] <= 0.49 and result["bytes_ratio"]["packed"] <= 0.26
    assert ("NOT MEASURED: 2 nodes" in out) == (result["hidden_fraction"] is None)
