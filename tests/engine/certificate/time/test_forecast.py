"""Forecasts: which steps are sampled, what scaling keeps, and that the overrides of a choice give the layout that was
modelled."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.certificate.time.cluster import ClusterConfig, LinkConfig
from foreroute.engine.certificate.time.forecast import Forecaster, StepsOfK, steps_of_k, time_part, worlds
from foreroute.engine.certificate.time.step_time import StepModel
from foreroute.engine.certificate.time.table_time import table_seconds
from foreroute.engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MoEConfig,
    NgramTablesConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from foreroute.engine.config.enums import Builder, ExchangeKind, Growth
from foreroute.engine.routing.k_schedule import active_experts
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import PlannedRouter, RouterInputs

SYMBOLS, VOCAB = 7, 7
TEXT = np.random.default_rng(0).integers(0, SYMBOLS, 6000).astype(np.uint8)
PLACE = Placement(4, 4, 2)
SLOW_LINK = ClusterConfig(ranks_per_node=2, inside=LinkConfig(1e-3, 1.0), between=LinkConfig(1e-4, 1.0))
SLOW_MESSAGES = replace(SLOW_LINK, inside=LinkConfig(1e3, 1e6), between=LinkConfig(1e3, 1e6))


def config() -> Config:
    return Config(
        data=DataConfig(streams=8, segment=16),
        model=ModelConfig(2, 16, heads=2, head_width=8, memory=16),
        moe=MoEConfig(experts=8, expert_width=16, ngram=2, rows=32),
        schedule=ScheduleConfig(Growth.linear, 1, 4),
        train=TrainConfig(steps=30),
        eval=EvalConfig(k=[1]),
        parallel=ParallelConfig(expert_ranks=4),
    )


def routers_of(moe: MoEConfig) -> Sequence[PlannedRouter]:
    return HashedRouter.build(moe, RouterInputs(SYMBOLS, 1, 1 if moe.share_table else 2, TEXT))


def forecaster(cluster: ClusterConfig = SLOW_LINK) -> Forecaster:
    return Forecaster(Layout(config(), PLACE), cluster, TEXT, VOCAB, routers_of)


def test_steps_of_each_k_are_those_of_the_schedule() -> None:
    cfg = config()
    ks = [active_experts(cfg.schedule, step, 30) for step in range(30)]
    assert steps_of_k(Layout(cfg, PLACE)) == [StepsOfK(k, ks.index(k), ks.count(k), "tokens") for k in sorted(set(ks))]
    assert {part.exchange for part in steps_of_k(Layout(cfg, Placement(4, 1, 2)))} == {"local"}


def test_tables_add_their_rows_to_each_step() -> None:
    """Distinct rows by plain sets of bigrams; everything else of a step stays as it is without tables."""
    tables = NgramTablesConfig(rows=1000, orders=[2], heads=1, width=16)
    layout = Layout(replace(config(), ngram_tables=tables), PLACE)
    without = forecaster().forecast(Layout(config(), PLACE))
    found = Forecaster(layout, SLOW_LINK, TEXT, VOCAB, routers_of).forecast(layout)
    streams = len(TEXT) // 8
    for one, other in zip(found.by_k, without.by_k, strict=True):
        assert replace(one.time, tables=0.0) == other.time
        part = next(part for part in steps_of_k(layout) if part.k == one.k)
        expected = []
        for step in (part.first + part.steps // 4, part.first + part.steps * 3 // 4):
            read = [set(), set(), set(), set()]
            for stream in range(8):
                start = stream * streams + 16 * step
                for place in range(start, start + 16):
                    left = TEXT[place - 1] if place else 0
                    read[stream // 2].add((left, TEXT[place]))
            expected.append(sum(map(len, read)) / 4)
        rows = sum(expected) / 2
        assert one.time.tables == pytest.approx(table_seconds(layout, SLOW_LINK, [rows]))
    assert found.run_s > without.run_s
    projected = replace(layout, config=replace(layout.config, ngram_tables=replace(tables, width=4)))
    left_out = [
        time_part(Forecaster(each, SLOW_LINK, TEXT, VOCAB, routers_of), search=False).left_out
        for each in (layout, projected)
    ]
    assert [[line.split(":")[0] for line in lines] for lines in left_out] == [[], ["ngram_tables"]]


def test_a_run_is_the_sum_of_its_steps() -> None:
    """One expert group: two steps of each k are replayed as they are, and stand for all of that k."""
    found = forecaster().forecast(Layout(config(), PLACE))
    total = 0.0
    for part in steps_of_k(Layout(config(), PLACE)):
        steps = [part.first + part.steps // 4, part.first + part.steps * 3 // 4]
        times = [
            StepModel(Layout(config(), PLACE), SLOW_LINK, VOCAB).time(counts).total
            for counts in replay(Layout(config(), PLACE), TEXT, routers_of(config().moe), steps)
        ]
        total += part.steps * sum(times) / len(times)
    assert found.run_s == pytest.approx(total)
    assert found.tokens_per_s == pytest.approx(30 * 8 * 16 / total)
    assert sum(part.steps for part in found.by_k) == 30


def test_scaling_keeps_the_streams_that_it_says() -> None:
    part = time_part(forecaster(), search=False)
    assert [(scale.ranks, scale.streams) for scale in part.strong] == [(1, 8), (2, 8), (4, 8), (8, 8)]
    # the text of 6,000 symbols is too short for streams of 1,024 ranks
    weak = [(scale.ranks, scale.streams) for scale in part.weak]
    assert weak == [(2**i, 2 * 2**i) for i in range(len(weak))] and len(weak) >= 7
    assert [scale.expert_ranks for scale in part.weak[:4]] == [1, 2, 4, 4]
    here = part.forecast.run_s / 30
    assert part.weak[2].step_s == pytest.approx(here) == part.strong[2].step_s
    assert part.weak[0].efficiency == 1.0
    assert part.weak[2].efficiency == pytest.approx(part.weak[0].step_s / here)


def apply(overrides: Sequence[str]) -> Config:
    """What the command line does with a choice."""
    found = config()
    kinds = {
        "exchange": ExchangeKind.__getitem__,
        "builder": Builder.__getitem__,
        "pack": int,
        "chunks": int,
        "expert_ranks": int,
    }
    for line in overrides:
        name, text = line.split("=")
        section, option = name.split(".")
        value = kinds.get(option, float)(text)
        found = replace(found, **{section: _unchecked(getattr(found, section), option, value)})
    return found


def _unchecked(section, option, value):
    changed = object.__new__(type(section))
    changed.__dict__.update(section.__dict__ | {option: value})
    return changed


def test_choices_come_fastest_first_and_their_overrides_give_them() -> None:
    made = forecaster()
    choices = made.choices()
    seconds = [choice.step_s for choice in choices]
    assert seconds == sorted(seconds)
    assert any(not choice.own_tables for choice in choices)
    for choice in [*choices[:3], choices[-1]]:
        cfg = apply(choice.overrides)
        place = Placement(4, cfg.parallel.expert_ranks, 2)
        assert made.forecast(Layout(cfg, place)).run_s / 30 == pytest.approx(choice.step_s)
        assert choice.own_tables == (cfg.moe == config().moe)


def test_the_best_choice_follows_the_cluster() -> None:
    """Where bytes are dear, groups move rows and few of them; where messages are, as few as can be are sent."""
    by_rate = forecaster().choices()
    packed = [c for c in by_rate if "moe.builder=packed" in c.overrides and "parallel.expert_ranks=4" in c.overrides]
    spread = [c for c in by_rate if c.own_tables and "parallel.expert_ranks=4" in c.overrides]
    assert packed[0].step_s < spread[0].step_s
    by_messages = forecaster(SLOW_MESSAGES).choices()
    assert by_messages[0].overrides == ["parallel.expert_ranks=1"]
    assert "parallel.chunks=4" in by_messages[-1].overrides


def test_choices_stand_on_the_nodes_of_the_run() -> None:
    """The run's nodes have 2 ranks. The cluster's of 8 would split groups of 3 or 6 of 12 ranks unevenly."""
    cfg = replace(
        config(), data=DataConfig(streams=12, segment=16), moe=MoEConfig(experts=12, expert_width=16, ngram=2, rows=32)
    )
    cluster = replace(SLOW_LINK, ranks_per_node=8)
    choices = Forecaster(Layout(cfg, Placement(12, 4, 2)), cluster, TEXT, VOCAB, routers_of).choices()
    groups = {int(choice.overrides[0].split("=")[1]) for choice in choices}
    assert groups == {1, 2, 4, 6, 12}  # of 3 ranks none: they would lie on two nodes in different ways
    eights = Forecaster(Layout(cfg, Placement(12, 4, 8)), cluster, TEXT, VOCAB, routers_of).choices()
    assert {int(c.overrides[0].split("=")[1]) for c in eights} == {1, 2, 4}


def test_scaling_has_the_runs_own_ranks_and_what_is_not_modelled_is_named() -> None:
    cfg = replace(config(), data=DataConfig(streams=12, segment=16), train=TrainConfig(steps=30, offload=True))
    place = Placement(6, 2, 2)
    part = time_part(Forecaster(Layout(cfg, place), SLOW_LINK, TEXT, VOCAB, routers_of), search=False)
    assert [scale.ranks for scale in part.strong] == [1, 2, 4, 6]
    assert part.strong[-1].step_s == pytest.approx(part.forecast.run_s / 30)
    assert len(part.left_out) == 1 and part.left_out[0].startswith("train.offload:")
    assert time_part(forecaster(), search=False).left_out == []
    on_cpu = time_part(forecaster(replace(SLOW_LINK, host_copies=True)), search=False)
    assert [line.split(":")[0] for line in on_cpu.left_out] == ["kernels.masked_from_k"]
    assert worlds(Placement(6, 2, 2)) == sorted([6, *(2**i for i in range(11))])
    assert worlds(Placement(12, 6, 6)) == [1, 6, 12, 24, 48, 96, 192, 384, 768]


def test_auto_is_asked_with_the_rates_of_the_cluster() -> None:
    many = forecaster(SLOW_MESSAGES)
    assert {part.exchange for part in steps_of_k(many.automatic())} == {"gather"}
    few = forecaster()
    assert {part.exchange for part in steps_of_k(few.automatic())} == {"tokens"}
    rates = few.automatic().config.parallel
    assert (rates.link_gb_per_s, rates.message_us) == (1e-4 / 2, 1.0)  # two ranks share a link
