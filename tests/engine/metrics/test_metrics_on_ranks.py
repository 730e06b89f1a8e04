"""Runs on 1, 2 and 4 ranks with pretended nodes: what every line says of ranks, layers and experts is what was counted
apart.

Rows of experts are counted from tables and ids; bytes inside and between nodes are those of the certificate.
"""

import json
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import distributed as dist

from benchmarks.models.step_rank import Silent
from foreroute.engine.certificate.counts.exact import bytes_left
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.config import (
    Corpus,
    CorpusConfig,
    DataConfig,
    Growth,
    KernelsConfig,
    ParallelConfig,
    ScheduleConfig,
    Split,
    WandbConfig,
)
from foreroute.engine.data.corpus import prepare
from foreroute.engine.data.streams import Streams
from foreroute.engine.metrics.names import METRICS
from foreroute.engine.metrics.writer import Metrics
from foreroute.engine.model.build import build_routers
from foreroute.engine.model.flops import Arithmetic
from foreroute.engine.parallel.cpu_group import GlooGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.engine.routing.k_schedule import active_experts
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.routers import route_of
from foreroute.engine.testing.tiny_run import EXPERTS, LAYERS, tiny_config
from foreroute.engine.train.trainer import Trainer

STEPS, WINDOW, SEGMENT, STREAMS = 10, 4, 4, 8
PEAK = 1e-3  # TFLOP/s of a rank


def plain(folder):
    return replace(
        tiny_config(accumulation=2, log_every=WINDOW, peak_tflops=PEAK),
        corpus=CorpusConfig(Corpus.file, str(folder / "text.txt"), cache_dir=str(folder / "cache")),
        data=DataConfig(streams=STREAMS, segment=SEGMENT),
        schedule=ScheduleConfig(Growth.linear, 1, EXPERTS),
        kernels=KernelsConfig(masked_from_k=EXPERTS + 1),
    )


# name: ranks, ranks of an expert group, each rank's node, router
CASES = {
    "one rank": (1, 1, (), "hashed"),
    "dense": (1, 1, (), "dense"),
    "two nodes of one": (2, 2, (0, 1), "hashed"),
    "one node of two": (2, 2, (), "hashed"),
    "live": (2, 2, (0, 1), "frozen"),
    "two nodes of two": (4, 4, (0, 0, 1, 1), "hashed"),
    "two groups": (4, 2, (0, 1, 2, 3), "hashed"),
}


def config_of(name, folder):
    _, expert_ranks, _, router = CASES[name]
    config = plain(folder)
    return replace(config, moe=replace(config.moe, router=router), parallel=ParallelConfig(expert_ranks=expert_ranks))


def train_one(name, rank, folder):
    ranks, expert_ranks, nodes, _ = CASES[name]
    config, world = config_of(name, folder), World(Mesh(rank, ranks, expert_ranks), node_P=nodes)
    if ranks > 1:
        cpu_group, planning = GlooGroup(dist.group.WORLD), GlooGroup(dist.new_group())
        world = replace(world, cpu_group=cpu_group, planning=planning)
    corpus = prepare(config.corpus)
    routers = build_routers(config, corpus, world.mesh)
    run = folder / name
    run.mkdir(exist_ok=True)
    trainer = Trainer(config, corpus, routers, run, Silent(), world)
    if rank:
        return trainer.run(None, lambda: False)
    with closing(Metrics(run, WandbConfig(), name="x", config_plain={})) as metrics:
        return trainer.run(metrics, lambda: False)


def train(rank, ranks, folder):
    return all(train_one(name, rank, folder) for name in CASES if CASES[name][0] == ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    draw = torch.randint(0, 9, (6000,), generator=torch.Generator().manual_seed(2)) + 97
    (folder / "text.txt").write_bytes(bytes(draw.tolist()))
    prepare(plain(folder).corpus)
    assert train(0, 1, folder)
    for ranks in (2, 4):
        assert run_ranks(train, ranks, ranks, folder) == [True] * ranks
    return folder


def lines(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def windows():
    """Steps of each line: three of them, the last one short."""
    return [range(0, 4), range(4, 8), range(8, STEPS)]


def counted_rows(name, folder):
    """Rows of each expert and rank in each step, token by token: [step, layer, E] and [step, P]."""
    ranks, expert_ranks, _, _ = CASES[name]
    config = config_of(name, folder)
    corpus = prepare(config.corpus)
    routers = build_routers(config, corpus)
    streams = Streams(corpus.split(Split.train), STREAMS, SEGMENT, config.context)
    rows_sLE, rows_sP = np.zeros((STEPS, LAYERS, EXPERTS)), np.zeros((STEPS, ranks))
    for step in range(STEPS):
        k = active_experts(config.schedule, step, STEPS)
        for rank in range(ranks):
            for micro in range(2):
                batch = streams.batch(step, streams.streams_of(rank, micro, world=ranks, accumulation=2))
                for layer, router in enumerate(routers):
                    for expert in route_of(router, batch.ids_BQ, batch.left_BC, k).expert_TK.flatten().tolist():
                        rows_sLE[step, layer, expert] += 1
                        home = expert // (EXPERTS // expert_ranks)
                        rows_sP[step, rank - rank % expert_ranks + home] += 1
    return rows_sLE, rows_sP


def certified_bytes(name, folder):
    """Bytes that leave each rank in each step, and those of them to ranks of its node: [step, P] each."""
    ranks, expert_ranks, nodes, _ = CASES[name]
    config = config_of(name, folder)
    per_node = nodes.count(0) if nodes else ranks
    place = Placement(ranks, expert_ranks, per_node)
    corpus = prepare(config.corpus)
    routers = build_routers(config, corpus)
    found = []
    for step in range(STEPS):
        (counts,) = replay(Layout(config, place), corpus.split(Split.train), routers, [step])
        left = bytes_left(Layout(config, place), counts)["tokens"]
        found.append([left.all_gP.reshape(-1), left.inside_gP.reshape(-1)])
    return np.array(found).swapaxes(0, 1)


@pytest.mark.dist
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][3] == "hashed"])
def test_lines_say_what_was_counted(name, folder):
    rows_sLE, rows_sP = counted_rows(name, folder)
    all_sP, inside_sP = certified_bytes(name, folder)
    ranks = CASES[name][0]
    assert (all_sP.sum() > 0) == (ranks > 1)
    for line, steps in zip(lines(folder, name), windows(), strict=True):
        mean_LE, window = rows_sLE[steps].mean(0), rows_sLE[steps]
        np.testing.assert_allclose(line["expert_rows"], mean_LE, atol=5.1e-4)  # rounded
        np.testing.assert_allclose(line["rank_rows"], rows_sP[steps].mean(0))
        load_sL = window.max(2) / window.mean(2)
        np.testing.assert_allclose(line["layer_load"], load_sL.mean(0), atol=1e-6)
        assert line["load_max_over_mean"] == pytest.approx(load_sL.max(1).mean())
        busy_s = rows_sP[steps].max(1) / rows_sP[steps].mean(1)
        assert line["rank_load_max_over_mean"] == pytest.approx(busy_s.mean())
        np.testing.assert_allclose(line["rank_wire_bytes"], all_sP[steps].mean(0))
        everything, inside = (bytes_sP[steps].sum(1).mean() for bytes_sP in (all_sP, inside_sP))
        assert line["wire_bytes"] == pytest.approx(everything)
        assert line["wire_bytes_inside"] == pytest.approx(inside)
        assert line["wire_bytes_between"] == pytest.approx(everything - inside)
        if ranks == 1:
            assert line["link_bytes"] == []
            continue
        link_PG = np.array(line["link_bytes"])
        np.testing.assert_allclose(link_PG.sum(1), line["rank_wire_bytes"])
        rank_P, group = np.arange(ranks), link_PG.shape[1]
        peer_PG = rank_P[:, None] // group * group + np.arange(group)
        assert (link_PG[peer_PG == rank_P[:, None]] == 0).all()
        node_P = np.array(CASES[name][2] or [0] * ranks)
        near_PG = node_P[peer_PG] == node_P[:, None]
        assert link_PG[near_PG].sum() == pytest.approx(inside)


@pytest.mark.dist
def test_the_cases_differ(folder):
    """Negative control: another step's, another layer's or another node's numbers would not pass."""
    rows_sLE, rows_sP = counted_rows("two nodes of two", folder)
    assert len({tuple(rows) for rows in rows_sLE.reshape(-1, EXPERTS)}) > STEPS * LAYERS - 3
    assert (rows_sP.std(1)[:-1] > 0).all()  # in the last step all experts are active
    found = {name: lines(folder, name)[1] for name in CASES}
    assert found["two nodes of one"]["wire_bytes_inside"] == 0 < found["two nodes of one"]["wire_bytes"]
    assert found["one node of two"]["wire_bytes_between"] == 0 < found["one node of two"]["wire_bytes"]
    split = found["two nodes of two"]
    assert 0 < split["wire_bytes_inside"] < split["wire_bytes_between"]
    assert found["two nodes of one"]["wire_bytes"] == found["one node of two"]["wire_bytes"]


@pytest.mark.dist
def test_a_live_router_is_counted_too(folder):
    """Its rows are not known beforehand: all of them are somewhere, and each rank has those of its experts."""
    for line, steps in zip(lines(folder, "live"), windows(), strict=True):
        config = config_of("live", folder)
        total = np.mean([active_experts(config.schedule, step, STEPS) for step in steps]) * STREAMS * SEGMENT
        rows_LE = np.array(line["expert_rows"])
        np.testing.assert_allclose(rows_LE.sum(1), [total] * LAYERS, atol=3e-3)
        np.testing.assert_allclose(line["rank_rows"], rows_LE.reshape(LAYERS, 2, -1).sum((0, 2)), atol=6e-3)
        assert line["wire_bytes_inside"] == 0 < line["wire_bytes"] == sum(line["rank_wire_bytes"])


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_every_name_is_there_with_its_axes(name, folder):
    """And numbers that must agree do."""
    ranks, expert_ranks, _, router = CASES[name]
    config = config_of(name, folder)
    corpus = prepare(config.corpus)
    dense = router == "dense"
    sizes = {"rank": ranks, "peer": expert_ranks, "layer": LAYERS, "expert": EXPERTS}
    empty = "rank_rows", "rank_wire_bytes", "link_bytes", "layer_load", "expert_rows"
    arithmetic = Arithmetic(config, corpus.vocab.size, 0)
    found = lines(folder, name)
    assert [line["step"] for line in found] == [4, 8, 10]
    before = 0.0
    for line in found:
        assert set(line) == {*METRICS, "step"} - {"valid_loss", "valid_bpc"}
        for metric, about in METRICS.items():
            if metric == "link_bytes" and ranks == 1:
                assert line[metric] == []
            elif metric in line and not (dense and metric in empty):
                assert np.shape(line[metric]) == tuple(sizes[axis] for axis in about.axes), metric
        assert not dense or all(line[metric] == [] for metric in empty)
        assert line["flops"] == pytest.approx(arithmetic.flops_before(line["step"]))
        per_second = (line["flops"] - before) / (line["step"] % WINDOW or WINDOW) / line["step_ms"] * 1e3
        before = line["flops"]
        assert line["mfu"] == pytest.approx(per_second / (ranks * PEAK * 1e12))
        assert line["tokens_per_second"] == pytest.approx(STREAMS * SEGMENT / line["step_ms"] * 1e3)
        assert line["tokens_per_second_per_rank"] == pytest.approx(line["tokens_per_second"] / ranks)
        outside = line["step_ms"] - line["forward_ms"] - line["backward_ms"] - line["optimizer_ms"]
        assert line["outside_ms"] == pytest.approx(outside) and outside > line["metric_ms"] > 0
        assert line["data_ms"] > 0
        assert line["rank_memory_bytes"][0] == pytest.approx(line["memory_bytes"], rel=0.1)
        assert line["rank_plan_wait_ms"][0] == pytest.approx(line["plan_wait_ms"])
        assert min(line["rank_own_ms"]) > 0
