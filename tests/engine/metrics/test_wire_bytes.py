"""A run of 40 steps on two ranks: what leaves them in each step is what their plans say, and the least possible."""

import json
from contextlib import closing

import pytest
import torch
from torch import distributed as dist

from foreroute.engine.config import (
    Config,
    Corpus,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    Growth,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    Split,
    TrainConfig,
    WandbConfig,
)
from foreroute.engine.data.corpus import prepare
from foreroute.engine.data.streams import Streams
from foreroute.engine.metrics.writer import Metrics
from foreroute.engine.model.build import build_routers
from foreroute.engine.parallel.cpu_group import GlooGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.engine.routing.k_schedule import active_experts
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.routers import plan_of, route_of
from foreroute.engine.train.trainer import Trainer

RANKS, STEPS, WIDTH, EXPERTS, LAYERS, SEGMENT, STREAMS = 2, 40, 8, 4, 2, 4, 4


class Silent:
    def note(self, line):
        pass

    def step(self, step):
        pass

    def metrics(self, step, values, seconds_left):
        pass


def make_config(folder):
    return Config(
        corpus=CorpusConfig(Corpus.file, str(folder / "text.txt"), cache_dir=str(folder / "cache")),
        data=DataConfig(streams=STREAMS, segment=SEGMENT),
        model=ModelConfig(layers=LAYERS, width=WIDTH, heads=1, head_width=8, memory=4),
        moe=MoEConfig(experts=EXPERTS, expert_width=8, ngram=2, rows=512),
        schedule=ScheduleConfig(Growth.linear, 1, EXPERTS),
        optim=OptimConfig(),
        train=TrainConfig(steps=STEPS, log_every=1, accumulation=2),
        eval=EvalConfig(k=[1]),
        kernels=KernelsConfig(masked_from_k=EXPERTS + 1),
        parallel=ParallelConfig(expert_ranks=RANKS),
    )


def train(rank, folder):
    config = make_config(folder)
    cpu_group, planning = GlooGroup(dist.group.WORLD), GlooGroup(dist.new_group())
    world = World(Mesh(rank, RANKS, RANKS), cpu_group=cpu_group, planning=planning)
    corpus = prepare(config.corpus)
    routers = build_routers(config, corpus, world.mesh)
    trainer = Trainer(config, corpus, routers, folder, Silent(), world)
    if rank:
        return trainer.run(None, lambda: False)
    with closing(Metrics(folder, WandbConfig(), name="bytes", config_plain={})) as metrics:
        return trainer.run(metrics, lambda: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    draw = torch.randint(0, 26, (6000,), generator=torch.Generator().manual_seed(2)) + 97
    (folder / "text.txt").write_bytes(bytes(draw.tolist()))
    assert run_ranks(train, RANKS, folder) == [True] * RANKS
    return folder


def predictions(folder):
    """Bytes of each step over all ranks: from the ranks' plans, and by counting distinct (token, other rank) pairs."""
    config = make_config(folder)
    corpus = prepare(config.corpus)
    routers = [build_routers(config, corpus, Mesh(rank, RANKS, RANKS)) for rank in range(RANKS)]
    streams = Streams(corpus.split(Split.train), STREAMS, SEGMENT, config.context)
    for step in range(STEPS):
        k = active_experts(config.schedule, step, STEPS)
        planned = counted = 0
        for micro in range(2):
            batches = [
                streams.batch(step, streams.streams_of(rank, micro, world=RANKS, accumulation=2))
                for rank in range(RANKS)
            ]
            ids, left = (torch.stack([getattr(b, name) for b in batches]) for name in ("ids_BQ", "left_BC"))
            for rank in range(RANKS):
                for router in routers[rank]:
                    planned += 2 * plan_of(router, ids, left, k).wire_bytes(WIDTH, 4)
                    chosen = route_of(router, ids[rank], left[rank], k).expert_TK.tolist()
                    homes = [{expert // (EXPERTS // RANKS) for expert in row} for row in chosen]
                    pairs = sum(len(home - {rank}) for home in homes)
                    counted += 4 * pairs * WIDTH * 4  # there and back, forward and backward, fp32
        yield planned, counted


def test_every_step_sends_what_its_plans_say(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sent = [row["wire_bytes"] for row in rows]
    planned, counted = zip(*predictions(folder), strict=True)
    assert len(sent) == STEPS and sent == list(planned) == list(counted)
    assert len(set(sent)) > 10 and {row["k"] for row in rows} == set(range(1, EXPERTS + 1))
