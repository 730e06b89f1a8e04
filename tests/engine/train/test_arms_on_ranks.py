"""Routers, weights and controls on two gloo ranks, experts shared out or not, against one rank; no dropout.

The optimizer is linear in the gradient, which shows every gradient with its scale (Adam as usual would hide it).
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import distributed as dist

from foreroute.engine.config import MoEConfig, NgramTablesConfig
from foreroute.engine.config.enums import Gate, Keys, RouteWeights
from foreroute.engine.data.planned_batches import group_batch, plan_batch
from foreroute.engine.data.streams import Streams
from foreroute.engine.model.build import build_model, restore_routers
from foreroute.engine.optim import deepspeed_engine as adapter
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.methods import training_passes
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.plans.row_plan import plan_rows
from foreroute.engine.routing.tables import build_tables, table_state
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.tiny_run import EXPERTS, SYMBOLS, tiny_config

STEPS, K = 3, 2
MOE = MoEConfig(experts=EXPERTS, expert_width=12, ngram=2, rows=64)
ARMS: dict[str, dict[str, Any]] = {
    "fresh": {"moe": {"router": "fresh"}},
    "stochastic": {"moe": {"router": "stochastic", "consistency": 2.0}},
    "shuffled": {"moe": {"keys": Keys.shuffled}},
    "sum": {"moe": {"weights": RouteWeights.sum}},
    "gate": {"moe": {"weights": RouteWeights.live, "gate": Gate.sqrt_softplus, "gate_scale": 1.5}},
    "experts without rows": {"moe": {"constant_experts": 2, "copy_experts": 1, "null_experts": 1}},
    "gate over all": {"moe": {"weights": RouteWeights.live, "constant_experts": 2, "copy_experts": 1}},
    "residual": {"moe": {"shared_width": 7, "residual": True}},
    "one expert layer": {"moe": {"layers": 1, "plain_width": 9}},
    "n-grams": {"moe": {"router": "dense"}, "model": {"ngram": 2, "ngram_rows": 30}},
    "n-grams beside experts": {"moe": {}, "model": {"ngram": 3, "ngram_rows": 30}},
    "a dense table": {
        "moe": {},
        "tables": {"rows": 30, "orders": [1, 3], "heads": 2, "width": 5, "optimizer": "dense"},
    },
    "signatures": {"moe": {"router": "dense"}, "model": {"signatures": True}},
}


class Case(NamedTuple):
    arm: str
    expert_ranks: int = 1
    stage: int = 1
    options: tuple[tuple[str, Any], ...] = ()  # of section train
    chunks: int = 1


CASES = [
    Case("fresh", 2),
    Case("fresh", 1, 2, (("accumulation", 2),)),
    Case("stochastic", 2, 3, (("recompute", True),)),
    Case("stochastic", 1, 0, (("accumulation", 2),)),
    Case("shuffled", 2, 2),
    Case("sum", 2, 2),
    Case("gate", 2, 3),
    Case("gate", 2, 1, (("accumulation", 2),), chunks=3),
    Case("gate", 2, 3, (("recompute", True),), chunks=3),  # the gate is used inside the experts' call
    Case("gate over all", 2, 3, chunks=3),
    Case("gate", 1, 2, (("recompute", True),)),
    Case("experts without rows", 2, 2, (("accumulation", 2),)),
    Case("residual", 2, 3),
    Case("one expert layer", 2),
    Case("n-grams", 1, 3),
    Case("a dense table", 2, 3, (("accumulation", 2),)),
    Case("n-grams beside experts", 2, 2, (("accumulation", 2),)),
    Case("signatures", 1),
]


def configure(case):
    config = tiny_config(case.stage, **dict(case.options))
    return replace(
        config,
        model=replace(config.model, **ARMS[case.arm].get("model", {})),
        moe=replace(MOE, **ARMS[case.arm]["moe"]),
        ngram_tables=NgramTablesConfig(**ARMS[case.arm].get("tables", {})),
        parallel=replace(config.parallel, chunks=case.chunks),
    )


def train(case, rank, ranks):
    """Mean losses over the ranks, and each parameter's norm; of experts over all."""
    config, mesh = configure(case), Mesh(rank, ranks, case.expert_ranks)
    adapter.build_optimizer = lambda params, _: torch.optim.Adam(params, 500.0, (0.0, 0.999), 1e3, fused=True)
    adapter.KEPT_WHOLE = 0  # at ZeRO-3 no weight stays gathered
    text = np.random.default_rng(0).integers(0, SYMBOLS, 2000).astype(np.uint8)
    tables = build_tables(config.moe, SYMBOLS, text, num_tables=config.num_tables, seed=1, cache_dir=None)
    model = build_model(config, SYMBOLS)
    if config.model.signatures:
        model.input_tables.fill([HashedRouter(table).row_sets(K).dense_weights(EXPERTS) for table in tables])
    routers = restore_routers(config, [table_state(t) for t in tables], SYMBOLS, mesh)
    engine = adapter.start(model, config, mesh)
    streams = Streams(text, config.data.streams, config.data.segment, config.context)
    accumulation, losses = config.train.accumulation, []
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in range(accumulation):
            batches = [
                streams.batch(step, streams.streams_of(r, micro, world=ranks, accumulation=accumulation))
                for r in mesh.ep_ranks
            ]
            planned = plan_batch(
                group_batch(batches, mesh.ep_rank),
                K,
                routers,
                chunks=case.chunks,
                passes=training_passes(config.model, config.moe),
                table_rows=plan_rows(model.table_keys, [batches[mesh.ep_rank]], CpuGroup())[0],
            )
            out = engine.forward(planned.batch.ids_BQ, planned.batch.targets_BQ, None, planned.routing)
            engine.backward(out.loss)
            total += out.loss.detach() / accumulation / ranks
        engine.step()
        dist.all_reduce(total)
        losses.append(float(total))
    weights = {}
    for name, state in engine.read_state():
        value = state["weight"].numpy().copy()
        if ".experts." in name:
            experts = mesh.local_experts(EXPERTS)
            weights |= {f"{name}@{e}": part for e, part in zip(experts, value, strict=True)}
        else:
            weights[name] = value
    return losses, weights


def several(rank, ranks, cases):
    """Run the cases in one group of processes."""
    return [train(case, rank, ranks) for case in cases]


@pytest.fixture(scope="module")
def one_rank():
    answers = run_ranks(several, 1, 1, [Case(arm) for arm in ARMS])[0]
    return dict(zip(ARMS, answers, strict=True))


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_train_like_one(one_rank):
    answers = run_ranks(several, 2, 2, CASES)
    for number, case in enumerate(CASES):
        want_losses, want = one_rank[case.arm]
        largest, seen = max(np.linalg.norm(value) for value in want.values()), set()
        for answer in answers:
            losses, got = answer[number]
            assert losses == pytest.approx(want_losses, rel=1e-6), case
            for name, value in got.items():
                error = np.linalg.norm(value - want[name])
                assert error <= 1e-6 * np.linalg.norm(want[name]) + 1e-7 * largest, (case, name)
            seen |= got.keys()
        assert seen == want.keys()


@pytest.mark.dist
def test_the_arms_differ(one_rank):
    """Negative control: what is compared above tells the arms apart."""
    losses = [found[0] for found in one_rank.values()]
    for i, one in enumerate(losses):
        assert all(one != pytest.approx(other, rel=1e-4) for other in losses[:i])
