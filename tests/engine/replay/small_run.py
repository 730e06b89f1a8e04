"""A small run on ranks that are not there."""

import numpy as np

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
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
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import RouterInputs

SYMBOLS, WORLD, RANKS, EXPERTS, LAYERS, WIDTH, STEPS = 7, 8, 4, 8, 2, 6, 9
STREAMS, SEGMENT, MICRO = 16, 3, 2


def make(**options):
    config = Config(
        data=DataConfig(streams=STREAMS, segment=SEGMENT),
        model=ModelConfig(layers=LAYERS, width=WIDTH),
        moe=MoEConfig(experts=EXPERTS, ngram=2, rows=40),
        schedule=ScheduleConfig(Growth.linear, 1, 3),
        train=TrainConfig(steps=STEPS, accumulation=MICRO),
        eval=EvalConfig(k=[1]),
        parallel=ParallelConfig(expert_ranks=RANKS, **options),
    )
    ids = np.random.default_rng(0).integers(0, SYMBOLS, STREAMS * (4 * SEGMENT + 1)).astype(np.uint8)  # 4 steps a pass
    routers = HashedRouter.build(config.moe, RouterInputs(SYMBOLS, 1, config.num_tables, ids))
    return Layout(config, Placement(WORLD, RANKS, 2)), ids, routers
