"""Training steps through DeepSpeed on 2 and 4 gloo ranks with shared experts against one rank with all experts.

The optimizer is linear in the gradient, which shows every gradient with its scale (Adam as usual would hide it).
"""

import numpy as np
import pytest
import torch
from torch import distributed as dist

from engine import deepspeed_adapter as adapter
from engine.build import build_model
from engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from engine.data import Streams
from engine.model import Routing
from engine.moe.routers import HashedRouter
from engine.moe.tables import build_tables
from engine.parallel.mesh import Mesh
from engine.testing import run_ranks

SYMBOLS, STREAMS, SEGMENT, STEPS, K = 11, 4, 16, 3, 2


def make_config(stage=1, clip=0.0, **options):
    return Config(
        data=DataConfig(streams=STREAMS, segment=SEGMENT),
        model=ModelConfig(layers=2, width=16, heads=2, head_width=8, memory=16, dropout=0.0, attention_dropout=0.0),
        moe=MoEConfig(experts=4, expert_width=12, ngram=2, rows=64),
        schedule=ScheduleConfig(k_min=K, k_max=K),
        optim=OptimConfig(clip=clip),
        train=TrainConfig(steps=10, zero_stage=stage, **options),
        eval=EvalConfig(k=[1]),
    )  # fmt: skip


def train(rank, ranks, expert_ranks, stage, **options):
    """Losses of the steps, and the final parameters with the global numbers of experts."""
    config, mesh = make_config(stage, **options), Mesh(rank, ranks, expert_ranks)
    accumulation = config.train.accumulation
    adapter.KEPT_WHOLE = 0
    # Adam with a huge epsilon: the update is 0.5 times the gradient
    adapter.build_optimizer = lambda params, _: torch.optim.Adam(params, 500.0, (0.0, 0.999), 1e3)
    text = np.random.default_rng(0).integers(0, SYMBOLS, 2000).astype(np.uint8)
    tables = build_tables(config.moe, SYMBOLS, text, num_tables=2, seed=1, cache_dir=None)
    routers = [HashedRouter(t, rank=mesh.expert_rank, ranks=expert_ranks) for t in tables]
    streams = Streams(text, STREAMS, SEGMENT, config.context)
    engine = adapter.start(build_model(config, SYMBOLS), config, mesh)
    losses, norms, memory = [], [], [None] * accumulation
    for step in range(STEPS):
        total = 0.0
        for micro in range(accumulation):
            batches = [
                streams.batch(step, streams.streams_of(r, micro, world=ranks, accumulation=accumulation))
                for r in mesh.group_ranks
            ]  # fmt: skip
            own = batches[mesh.expert_rank]
            ids, left = ([getattr(b, name) for b in batches] for name in ("ids_BQ", "left_BC"))
            plans = tuple(router.plan(ids, left, K) for router in routers)
            out = engine.forward(own.ids_BQ, own.targets_BQ, memory[micro], Routing(K, plans))
            engine.backward(out.loss)
            memory[micro] = out.memory
            total = total + out.loss.detach() / accumulation
        assert engine.step()
        norms.append(engine.grad_norm())
        if step == 1:
            engine.module.eval()
            with torch.inference_mode():
                evaluated = engine.module(own.ids_BQ, own.targets_BQ, memory[0], Routing(K, plans))
            engine.module.train()
            if rank == 0: print(expert_ranks, stage, options, "EVAL", evaluated.loss.item())
        dist.all_reduce(total)
        losses.append(float(total) / ranks)
    state = {name: values["weight"] for name, values in engine.read_state()}
    return losses, {name: value.numpy() for name, value in named(state, mesh)}, norms


def named(parameters, mesh):
    """Parameters; of experts each by itself under its global number."""
    for name, value in parameters.items():
        if ".experts." in name:
            for number, expert in zip(mesh.local_experts(4), value, strict=True):
                yield f"{name}@{number}", expert
        else:
            yield name, value


def several(rank, ranks, cases):
    """Run several cases in one group of processes, one engine after the other."""
    result = []
    for *case, options in cases:
        result.append(train(rank, ranks, *case, **options))
        if rank == 0: print(case, options, result[-1][0], result[-1][2])
    return result


def compare(got, want):
    losses, parameters, norms = got
    assert norms == pytest.approx(want[2], rel=1e-5)
    assert losses == pytest.approx(want[0], rel=1e-6)
    largest = max(np.linalg.norm(value) for value in want[1].values())
    for name, value in parameters.items():
        bound = 1e-6 * np.linalg.norm(want[1][name]) + 1e-7 * largest
        assert np.linalg.norm(value - want[1][name]) < bound, name


@pytest.fixture(scope="module")
def reference():
    """One rank; what every number of ranks must equal."""
    return run_ranks(several, 1, 1, [(1, 1, {})])[0][0]


CASES = {1: [(1,3,{}), (1,2,{"offload": True}), (1,3,{"recompute": True})], 2: [(2, 0, {}), (2, 3,{}), (1,3,{}), (2,3,{"accumulation":2}), (2,3,{"recompute":True}),(2,1,{"offload":True}),(2,2,{"offload":True,"accumulation":2}),(2,3,{"offload":True,"accumulation":2})], 4:[(2,0,{}),(2,3,{}),(4,3,{})]}


@pytest.mark.dist
@pytest.mark.parametrize("ranks", CASES)
def test_ranks_train_like_one(ranks, reference):
    answers = run_ranks(several, ranks, ranks, CASES[ranks])
    for index, case in enumerate(CASES[ranks]):
        for answer in answers:
            print(case)
            compare(answer[index], reference)
        experts = {name for answer in answers for name in answer[index][1] if "@" in name}
        assert len(experts) == 2 * 4 * 4, case  # layers, experts, parameters: none is missing


@pytest.mark.dist
def test_the_reference_moves(reference):
    """Negative control: three steps change every kind of parameter by far more than the bound."""
    start = dict(named(dict(build_model(make_config(1), SYMBOLS).named_parameters()), Mesh()))
    moved = {name for name, value in reference[1].items() if np.linalg.norm(value - start[name].detach().numpy()) > 1e-4}  # fmt: skip
    assert any("w1@" in name for name in moved) and any("b2@" in name for name in moved)


def test_a_wrong_scale_is_seen(reference):
    """Negative control: an expert's gradient that is off by a factor, as from a wrong group of ranks."""
    losses, parameters, norms = reference
    start = dict(named(dict(build_model(make_config(1), SYMBOLS).named_parameters()), Mesh()))
    name = next(name for name in parameters if "w1@" in name)
    wrong = parameters[name] + 0.01 * (parameters[name] - start[name].detach().numpy())
    with pytest.raises(AssertionError, match="w1@"):
        compare((losses, {**parameters, name: wrong}, norms), reference)
