"""The thinned series of a run against plain loops over all of its steps."""

from dataclasses import asdict, fields

import numpy as np
import pytest

from foreroute.engine.certificate.counts.exact import certify
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import StepCounts, replay
from foreroute.engine.certificate.counts.series import MeanAndMax, SeriesCollector, StepSeries
from foreroute.engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    Growth,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from foreroute.engine.config.enums import ExchangeKind
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import RouterInputs

SYMBOLS, STREAMS, SEGMENT, LAYERS, EXPERTS, STEPS = 5, 8, 3, 2, 4, 23
PLACE = Placement(world_size=4, expert_ranks=2, ranks_per_node=1)


def make(parallel, k_min, k_max):
    config = Config(
        data=DataConfig(streams=STREAMS, segment=SEGMENT),
        model=ModelConfig(layers=LAYERS, width=6),
        moe=MoEConfig(experts=EXPERTS, ngram=2, rows=40),
        schedule=ScheduleConfig(Growth.linear, k_min, k_max),
        train=TrainConfig(steps=STEPS),
        eval=EvalConfig(k=[1]),
        parallel=parallel,
    )
    draw = np.random.default_rng(0).integers(0, SYMBOLS, STREAMS * (5 * SEGMENT + 1))
    ids = draw.astype(np.uint8)  # 5 segments an epoch: the 23 steps come back to each of them
    return config, ids, HashedRouter.build(config.moe, RouterInputs(SYMBOLS, 1, LAYERS, ids))


def of_step(counts, kind):
    """The values of one step in plain loops over layers, groups and ranks; one micro-batch, fp32 rows of width 6."""
    received, computed, by_expert, sent = [], [], [], {}
    tokens = STREAMS * SEGMENT // PLACE.world_size
    for layer in range(LAYERS):
        for group in range(2):
            pairs = counts.sent_ymgPP[layer, 0, group].tolist()
            experts = counts.count_ymgE[layer, 0, group].tolist()
            by_expert += experts
            for rank in range(2):
                other = 1 - rank
                received.append(pairs[0][rank] + pairs[1][rank])
                computed.append(experts[2 * rank] + experts[2 * rank + 1])
                there, back = (tokens, tokens) if kind == "gather" else (pairs[rank][other], pairs[other][rank])
                # rows and their gradients, each way
                sent[group, rank] = sent.get((group, rank), 0) + 2 * (there + back) * 6 * 4
    return {
        "k": counts.k,
        "received_load": max(received) / (sum(received) / len(received)),
        "computed_load": max(computed) / (sum(computed) / len(computed)),
        "expert_load": max(by_expert) / (sum(by_expert) / len(by_expert)),
        "busiest_rank_bytes": max(sent.values()),
        "mean_rank_bytes": sum(sent.values()) / len(sent),
    }


@pytest.mark.parametrize(
    ("parallel", "kind"),
    [(ParallelConfig(), "tokens"), (ParallelConfig(exchange=ExchangeKind.gather), "gather")],
    ids=["tokens", "gather"],
)
@pytest.mark.parametrize("sample", [1, 4])
def test_points_are_what_loops_over_all_steps_give(parallel, kind, sample):
    config, ids, routers = make(parallel, 1, 3)
    series = certify(Layout(config, PLACE), ids, routers, sample=sample).series
    steps = list(range(0, STEPS, sample))
    assert (
        series.first_step == series.last_step == [step + 1 for step in steps]
    )  # fewer than 500: each a point of its own
    for i, step in enumerate(steps):
        (counts,) = replay(Layout(config, PLACE), ids, routers, [step])
        for name, value in of_step(counts, kind).items():
            line = getattr(series, name)
            assert line.mean[i] == line.max[i] == pytest.approx(value, rel=1e-12), (name, step)
    assert len(set(series.k.max)) == 3 and len(set(series.computed_load.max)) > 3


def test_the_exchange_counted_is_the_one_used():
    """Negative control of the test above: the two kinds differ, and so must what is counted."""
    by_kind = [
        certify(Layout(config, PLACE), ids, routers).series
        for config, ids, routers in (
            make(ParallelConfig(exchange=kind), 1, 3) for kind in (ExchangeKind.tokens, ExchangeKind.gather)
        )
    ]
    assert by_kind[0].mean_rank_bytes != by_kind[1].mean_rank_bytes
    assert by_kind[0].received_load == by_kind[1].received_load


def test_nothing_leaves_a_rank_that_is_alone():
    config, ids, routers = make(ParallelConfig(), 2, 2)
    series = certify(Layout(config, Placement(4, 1, 1)), ids, routers).series
    assert set(series.busiest_rank_bytes.max) == {0.0} and min(series.expert_load.max) > 1


def counts_of(steps, rows):
    """A step of one layer and micro-batch and one group of a single rank with two experts."""
    one = np.array(rows).reshape(1, 1, 1, 2)
    sent = np.full((1, 1, 1, 1, 1), 4)
    return StepCounts(np.array(steps), 1, sent, sent[..., 0], one)


def test_runs_of_steps_keep_means_and_maxima():
    """Seven steps as three points, the one bad step between others; equal steps come in one piece, out of order."""
    collector = SeriesCollector()
    for steps, rows, left in (([0, 2, 4, 6], [4, 4], 10), ([1, 3], [5, 3], 20), ([5], [8, 0], 90)):
        collector.add(counts_of(steps, rows), np.array([[left]]))
    series = collector.series(3)
    assert (series.first_step, series.last_step) == ([1, 3, 5], [2, 4, 7])
    assert series.expert_load == MeanAndMax([1.125, 1.125, pytest.approx(4 / 3)], [1.25, 1.25, 2.0])
    assert series.mean_rank_bytes == MeanAndMax([15, 15, pytest.approx(110 / 3)], [20, 20, 90])
    lost = collector.series(7).mean_rank_bytes
    assert lost.mean == [10, 20, 10, 20, 10, 90, 10] and lost != series.mean_rank_bytes


def test_a_long_run_is_thinned_and_loses_no_step():
    collector = SeriesCollector()
    values = np.random.default_rng(2).integers(1, 10**6, 1234)
    for step, value in enumerate(values.tolist()):
        collector.add(counts_of([step], [4, 4]), np.array([[value]]))
    series = collector.series()
    assert len(series.first_step) == 500 and max(series.mean_rank_bytes.max) == values.max()
    sizes = np.array(series.last_step) + 1 - np.array(series.first_step)
    assert sizes.sum() == 1234 and set(sizes.tolist()) == {2, 3}
    assert sizes @ np.array(series.mean_rank_bytes.mean) == pytest.approx(values.sum(), rel=1e-12)
    lengths = {
        len(part)
        for name in fields(StepSeries)
        if not name.name.endswith("step")
        for part in asdict(series)[name.name].values()
    }
    assert lengths == {500}
