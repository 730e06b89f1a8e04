"""The sums of a certificate against plain loops over tokens, and what is refused."""

import json
from collections import Counter
from dataclasses import asdict, replace
from math import ceil

import numpy as np
import pytest

from foreroute.engine.certificate.counts import tally
from foreroute.engine.certificate.counts.exact import certify
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import StepCounts, replay
from foreroute.engine.certificate.counts.tally import Tally
from foreroute.engine.certificate.counts.traffic import KINDS, hops
from foreroute.engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    Growth,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    ScheduleConfig,
    TrainConfig,
)
from foreroute.engine.config.enums import ExchangeKind, Keys
from foreroute.engine.data.streams import Streams
from foreroute.engine.errors import UserError
from foreroute.engine.routing.k_schedule import active_experts
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.routers import route_of

SYMBOLS, STEPS, WORLD, RANKS, PER_NODE, EXPERTS, LAYERS, WIDTH = 7, 9, 8, 4, 2, 8, 2, 6
STREAMS, SEGMENT, MICRO = 16, 3, 2
TOKENS = STREAMS // WORLD // MICRO * SEGMENT


def make(**changes):
    config = Config(
        data=DataConfig(streams=STREAMS, segment=SEGMENT),
        model=ModelConfig(layers=LAYERS, width=WIDTH),
        moe=MoEConfig(experts=EXPERTS, ngram=2, rows=40),
        schedule=ScheduleConfig(Growth.linear, 1, 3),
        optim=OptimConfig(),
        train=TrainConfig(steps=STEPS, accumulation=MICRO),
        eval=EvalConfig(k=[1]),
    )
    return replace(config, **changes)


def text(epoch_segments=5):
    draw = np.random.default_rng(0).integers(0, SYMBOLS, STREAMS * (epoch_segments * SEGMENT + 1))
    return draw.astype(np.uint8)


def routers_of(config, ids, seed=1):
    return HashedRouter.build(config.moe, RouterInputs(SYMBOLS, seed, config.num_tables, ids))


def routes(config, ids, routers, step, k):
    """Yield (layer, micro, rank, experts of a token) of a step, token by token."""
    streams = Streams(ids, STREAMS, SEGMENT, config.context)
    for micro in range(MICRO):
        for rank in range(WORLD):
            shares = streams.streams_of(rank, micro, world=WORLD, accumulation=MICRO)
            batch = streams.batch(step, shares)
            for layer in range(LAYERS):
                router = routers[layer % len(routers)]
                for experts in route_of(router, batch.ids_BQ, batch.left_BC, k).expert_TK.tolist():
                    yield layer, micro, rank, experts


def trips(kind, rank, homes):
    """The hops, as pairs of ranks, of one token on its way to the ranks `homes`."""
    group = rank // RANKS * RANKS
    if kind == "gather":
        homes = set(range(group, group + RANKS))
    if kind != "two_level":
        return [(rank, home) for home in homes if home != rank]
    found = set()
    for home in homes:
        entry = home // PER_NODE * PER_NODE + rank % PER_NODE
        found |= {(rank, entry), (entry, home)}
    return [(a, b) for a, b in found if a != b]


def loops(config, ids, routers, steps):
    """Everything a certificate is made of, as lists of (k, step, value), by name; and sent pairs."""
    lists = {}

    def note(name, k, step, values):
        lists.setdefault(name, []).extend((k, step, value) for value in values)

    for step in steps:
        received, computed, by_expert, pairs, sent = (Counter() for _ in range(5))
        k = active_experts(config.schedule, step, config.schedule_steps)
        for layer, micro, rank, experts in routes(config, ids, routers, step, k):
            group = rank // RANKS * RANKS
            homes = {group + expert // (EXPERTS // RANKS) for expert in experts}
            for home in homes:
                received[layer, micro, home] += 1
                pairs[layer, micro, rank, home] += 1
            for expert in experts:
                by_expert[layer, micro, group // RANKS, expert] += 1
                computed[layer, micro, group + expert // (EXPERTS // RANKS)] += 1
            for kind in KINDS:
                for a, b in trips(kind, rank, homes):  # forward and backward, there and back
                    size = 2 * WIDTH * 4
                    near = "inside" if a // PER_NODE == b // PER_NODE else "between"
                    for sender in (a, b):
                        sent[kind, sender] += size
                        sent[f"{kind} {near}", sender] += size
        places = [(layer, micro) for layer in range(LAYERS) for micro in range(MICRO)]
        note("received_rows", k, step, [received[*p, r] for p in places for r in range(WORLD)])
        local = EXPERTS // RANKS
        groups = range(WORLD // RANKS)
        note("expert_rows", k, step, [by_expert[*p, g, e] for p in places for g in groups for e in range(EXPERTS)])
        note(
            "computed_rows",
            k,
            step,
            [
                sum(by_expert[*p, g, e] for e in range(r * local, (r + 1) * local))
                for p in places
                for g in groups
                for r in range(RANKS)
            ],
        )
        for name, rows in (("received", received), ("computed", computed)):
            sums = [
                sum(rows[layer, micro, r] for layer in range(LAYERS)) for micro in range(MICRO) for r in range(WORLD)
            ]
            note(f"{name}_layers", k, step, sums)
        note(
            "pair",
            k,
            step,
            [
                pairs[*p, g * RANKS + a, g * RANKS + b]
                for p in places
                for g in groups
                for a in range(RANKS)
                for b in range(RANKS)
            ],
        )
        for kind in KINDS:
            for name in (kind, f"{kind} inside", f"{kind} between"):
                note(name, k, step, [sent[name, rank] for rank in range(WORLD)])
    return lists


def spread(entries):
    values = sorted(value for _, _, value in entries)
    return {
        "mean": pytest.approx(sum(values) / len(values), rel=1e-12),
        "p99": values[ceil(0.99 * len(values)) - 1],
        "max": values[-1],
        "worst_step": 1 + next(step for _, step, value in entries if value == values[-1]),
    }


def idle(entries):
    steps = sorted({step for _, step, value in entries if value == 0})
    return {"steps": len(steps), "first_step": steps[0] + 1 if steps else None}


def section(lists):
    """What a StepStatistics says of these lists but for k and the exchange."""
    pair, expert = spread(lists["pair"]), spread(lists["expert_rows"])

    def padding(entries):
        values = [value for _, _, value in entries]
        return pytest.approx(1 - sum(values) / len(values) / max(values), rel=1e-12)

    return {
        "steps": len({step for _, step, _ in lists["pair"]}),
        "received_rows": spread(lists["received_rows"]),
        "computed_rows": spread(lists["computed_rows"]),
        "received_layers": spread(lists["received_layers"]),
        "computed_layers": spread(lists["computed_layers"]),
        "expert_rows": expert,
        "idle_rank": idle(lists["received_rows"]),
        "idle_expert": idle(lists["expert_rows"]),
        "static": {
            "pair_rows": pair["max"],
            "pair_padding": padding(lists["pair"]),
            "expert_rows": expert["max"],
            "expert_padding": padding(lists["expert_rows"]),
        },
        "bytes": {
            kind: {
                "rank": spread(lists[kind]),
                "inside": spread(lists[f"{kind} inside"]),
                "between": spread(lists[f"{kind} between"]),
                "total": sum(value for *_, value in lists[kind]),
            }
            for kind in KINDS
        },
    }


@pytest.mark.parametrize("share_table", [False, True])
@pytest.mark.parametrize(("steps", "sample"), [(None, 1), (8, 3)])
def test_a_certificate_says_what_loops_count(steps, sample, share_table):
    """Nine steps of an epoch of five: some segments come twice, at the same k (one of the choices) or another."""
    config = make(moe=MoEConfig(experts=EXPERTS, ngram=2, rows=40, share_table=share_table))
    ids = text()
    routers = routers_of(config, ids)
    place = Placement(WORLD, RANKS, PER_NODE)
    found = certify(Layout(config, place), ids, routers, steps=steps, sample=sample)
    lists = loops(config, ids, routers, range(0, steps or STEPS, sample))
    known = {"k": None, "exchange": "tokens"}
    assert asdict(found.whole) == known | section(lists)
    ks = sorted({k for k, *_ in lists["pair"]})
    assert [part.k for part in found.by_k] == ks and len(ks) >= 2
    for part in found.by_k:
        own = {name: [e for e in entries if e[0] == part.k] for name, entries in lists.items()}
        assert asdict(part) == known | {"k": part.k} | section(own)
    assert (found.tokens, found.row_bytes, found.trips) == (TOKENS, WIDTH * 4, (2, 2))
    assert found.whole.idle_expert.steps > 0  # such a small batch cannot feed all experts
    other = certify(Layout(config, place), ids, routers_of(config, ids, seed=2), steps=steps, sample=sample)
    assert asdict(other.whole) != asdict(found.whole)  # negative control
    json.dumps(asdict(found))


def test_a_run_that_starts_elsewhere_in_the_text_is_counted_from_there():
    config, place, ids = make(), Placement(WORLD, RANKS, PER_NODE), text()
    routers = routers_of(config, ids)
    moved = replace(config, data=replace(config.data, start=0.4))  # segment 2 of the 5 of an epoch
    (first,) = replay(Layout(moved, place), ids, routers, [0])
    plain = list(replay(Layout(config, place), ids, routers, [0, 2]))
    assert plain[1].step == 2 and plain[1].k == first.k
    assert (first.count_ymgE == plain[1].count_ymgE).all()
    assert not (first.count_ymgE == plain[0].count_ymgE).all()


def test_repeated_steps_are_counted_once_and_weigh_their_number():
    config = make(schedule=ScheduleConfig(k_max=2), train=TrainConfig(steps=23))
    ids = text()
    routers, place = routers_of(config, ids), Placement(WORLD, RANKS, PER_NODE)
    found = list(replay(Layout(config, place), ids, routers, range(23)))
    assert [(counts.step, counts.times) for counts in found] == [(0, 5), (1, 5), (2, 5), (3, 4), (4, 4)]
    (again,) = replay(Layout(config, place), ids, routers, [17])
    assert (again.count_ymgE == found[2].count_ymgE).all() and (again.sent_ymgPP == found[2].sent_ymgPP).all()
    whole = certify(Layout(config, place), ids, routers).whole
    weighted = sum(counts.received_ymgP.mean() * counts.times for counts in found) / 23
    assert whole.steps == 23 and whole.received_rows.mean == pytest.approx(weighted)


def test_more_than_255_tokens_and_many_experts():
    """Fields of a byte do not overflow, whatever their number."""
    streams, segment, experts, ranks = 4, 600, 33, 3
    config = Config(
        data=DataConfig(streams * ranks, segment),
        model=ModelConfig(layers=1),
        train=TrainConfig(steps=1),
        moe=MoEConfig(experts=experts, ngram=1, rows=8),
        schedule=ScheduleConfig(k_max=20),
        eval=EvalConfig(k=[1]),
    )
    ids = np.zeros(streams * ranks * (segment + 1), np.uint8)  # one n-gram: every token is alike
    (table,) = build_tables(config.moe, SYMBOLS, ids, num_tables=1, seed=1, cache_dir=None)
    (counts,) = replay(Layout(config, Placement(ranks, ranks)), ids, [HashedRouter(table)], [0])
    chosen = table.order_rE[0, :20].tolist()
    tokens = streams * segment
    want = [ranks * tokens * (expert in chosen) for expert in range(experts)]
    assert counts.count_ymgE.flatten().tolist() == want
    homes = {expert // (experts // ranks) for expert in chosen}
    want = [[tokens * (rank in homes) for rank in range(ranks)]] * ranks
    assert counts.sent_ymgPP[0, 0, 0].tolist() == want


def test_the_example_of_a_two_level_exchange():
    """Two nodes of two ranks: one token with experts on ranks 1, 2 and 3, one with experts on rank 3."""
    sent, nodes = np.zeros((1, 1, 1, 4, 4), np.int64), np.zeros((1, 1, 1, 4, 2), np.int64)
    sent[..., 0, :], nodes[..., 0, :] = [0, 1, 1, 2], [1, 2]
    counts = StepCounts(np.array([0]), 3, sent, nodes, np.zeros((1, 1, 1, 8), np.int64))
    found = hops(counts, "two_level", Placement(4, 4, 2), tokens=2)[0, 0, 0]
    assert found.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]]


def test_a_tally_is_exact_when_it_puts_values_together(monkeypatch):
    monkeypatch.setattr(tally, "_LOOSE", 3)
    draw, entries, found = np.random.default_rng(1), [], [Tally(), Tally()]
    for step in range(40):
        values = draw.integers(0, 50, 7)
        found[step % 2].add(values, step, 1 + step % 3)
        entries += [(0, step, value) for value in values.tolist()] * (1 + step % 3)
    assert asdict(Tally.spread(found)) == spread(entries)
    assert Tally.total(found) == sum(value for *_, value in entries)


def test_bytes_are_those_of_the_wire_format():
    bf16 = make(train=TrainConfig(steps=STEPS, accumulation=MICRO, precision=Precision.bf16))
    ids = text()
    found = certify(Layout(bf16, Placement(WORLD, RANKS, PER_NODE)), ids, routers_of(bf16, ids))
    assert found.row_bytes == WIDTH * 2


@pytest.mark.parametrize(
    ("changes", "place", "options", "words"),
    [
        ({}, (3, 1), {}, "data.streams=16: must be a multiple of world x train.accumulation = 3 x 2"),
        ({}, (8, 3), {}, "parallel.expert_ranks=3: must divide the number of ranks, 8"),
        ({"data": DataConfig(480, 3)}, (16, 16), {}, "moe.experts=8: must be a multiple of parallel.expert_ranks=16"),
        ({}, (8, 8, 3), {}, "ranks_per_node=3: must be a multiple or a divisor of the expert group's 8"),
        ({}, (8, 8, 0), {}, "ranks_per_node=0: must be at least 1"),
        ({}, (8, 4), {"steps": STEPS + 1}, "steps=10: must be from 1 to train.steps=9"),
        ({}, (8, 4), {"sample": 10}, "sample=10: must be from 1 to the 9 steps"),
        ({"moe": MoEConfig(router="learned")}, (8, 4), {}, "moe.router=learned: routes depend on hidden states"),
        ({"moe": MoEConfig(router="dense")}, (8, 4), {}, "moe.router=dense without n-gram tables"),
        ({"moe": MoEConfig(router="fresh")}, (8, 4), {}, "moe.router=fresh: routes are drawn at each forward pass"),
        (
            {"moe": MoEConfig(keys=Keys.shuffled)},
            (8, 4),
            {},
            "moe.keys=shuffled: routes are drawn at each forward pass",
        ),
        ({"data": DataConfig(16, 9000)}, (8, 4), {}, "need a training split of at least"),
    ],
)
def test_what_is_refused(changes, place, options, words):
    ids = text()
    with pytest.raises(UserError) as error:
        certify(Layout(make(**changes), Placement(*place)), ids, routers_of(make(), ids), **options)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "nodes", "near"),
    [
        (Placement(16, 8, 4), 2, [0, 0, 0, 0, 1, 1, 1, 1]),
        (Placement(16, 4, 8), 1, [0, 0, 0, 0]),
        (Placement(2, 2, 8), 1, [0, 0]),
        (Placement(8, 8, 1), 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_nodes_of_a_group(place, nodes, near):
    assert place.group_nodes == nodes
    assert place.same_node_PP.tolist() == [[a == b for b in near] for a in near]


def test_auto_is_named_for_each_k():
    parallel = ParallelConfig(exchange=ExchangeKind.auto, link_gb_per_s=1e-3)
    config = make(schedule=ScheduleConfig(Growth.linear, 1, EXPERTS), parallel=parallel)
    ids = text()
    routers = routers_of(config, ids)
    found = certify(Layout(config, Placement(WORLD, RANKS, PER_NODE)), ids, routers)
    assert [found.by_k[0].exchange, found.by_k[-1].exchange, found.whole.exchange] == ["tokens", "gather", "mixed"]
    alone = certify(Layout(config, Placement(WORLD, 1, PER_NODE)), ids, routers).whole
    assert alone.exchange == "local" and alone.bytes["tokens"].total == 0
