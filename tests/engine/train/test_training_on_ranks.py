"""Training steps through DeepSpeed on 2 and 4 gloo ranks against one rank, for every way to run an expert layer.

ZeRO stage x router x exchange x parts x recomputation, 96 combinations: on two ranks some in which every three levels
occur together, on four ranks some in which every two do.
The optimizer is linear in the gradient, which shows every gradient with its scale (Adam as usual would hide it).
"""

import itertools
from typing import NamedTuple

import deepspeed
import numpy as np
import pytest
import torch
from torch import distributed as dist

from foreroute.engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from foreroute.engine.config.enums import BalanceOver, ExchangeKind
from foreroute.engine.model.build import build_model
from foreroute.engine.optim import deepspeed_engine as adapter
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.routers import hashed_of, plan_of

SYMBOLS, STREAMS, SEGMENT, STEPS, K, MARGIN = 11, 4, 8, 3, 2, 1e-5


class Case(NamedTuple):
    router: str
    exchange: ExchangeKind = ExchangeKind.tokens
    chunks: int = 1
    recompute: bool = False
    stage: int = 1
    expert_ranks: int = 2
    balance_over: str = "global"


ROUTERS = ("hashed", "frozen", "learned")
FACTORS = (ROUTERS, (ExchangeKind.tokens, ExchangeKind.gather), (1, 4), (False, True), (0, 1, 2, 3))
ALL = [Case(*levels) for levels in itertools.product(*FACTORS)]


def together(case, count):
    """Every `count` levels that the case combines."""
    return set(itertools.combinations(enumerate(case[: len(FACTORS)]), count))


def cover(count):
    """Some of all cases, in which every `count` levels occur together: each next one has the most new ones."""
    chosen, missing = [], set().union(*(together(case, count) for case in ALL))
    while missing:
        chosen.append(max(ALL, key=lambda case: len(together(case, count) & missing)))
        missing -= together(chosen[-1], count)
    return chosen


CASES = [
    Case("hashed", chunks=3, recompute=True),
    Case("frozen", ExchangeKind.gather, 3, recompute=True, stage=2),
    Case("learned", stage=0),
    Case("learned", chunks=3, expert_ranks=1),
]
MICRO = Case("learned", balance_over="micro")


def make_config(case):
    return Config(
        data=DataConfig(streams=STREAMS, segment=SEGMENT),
        model=ModelConfig(
            layers=2, width=16, heads=2, head_width=8, memory=8, dropout=0.0, attention_dropout=0.0, init_std=0.3
        ),
        moe=MoEConfig(
            router=case.router,
            experts=4,
            expert_width=12,
            ngram=2,
            rows=64,
            balance_loss=0.5,
            balance_over=BalanceOver[case.balance_over],
        ),
        schedule=ScheduleConfig(k_min=K, k_max=K),
        optim=OptimConfig(clip=0.0),
        train=TrainConfig(steps=10, zero_stage=case.stage, recompute=case.recompute),
        eval=EvalConfig(k=[1]),
        parallel=ParallelConfig(expert_ranks=case.expert_ranks, exchange=case.exchange, chunks=case.chunks),
    )


def train(case, rank, ranks):
    """Mean losses of the steps, final parameters, and what was sent and predicted on the last step."""
    config, mesh = make_config(case), Mesh(rank, ranks, case.expert_ranks)
    # Adam with a huge epsilon: the update is 0.5 times the gradient
    adapter.build_optimizer = lambda params, _: torch.optim.Adam(params, 500.0, (0.0, 0.999), 1e3, fused=True)
    text = np.random.default_rng(0).integers(0, SYMBOLS, 2000).astype(np.uint8)
    routers = None
    if case.router == "hashed":
        tables = build_tables(config.moe, SYMBOLS, text, num_tables=2, seed=1, cache_dir=None)
        routers = hashed_of(tables, mesh)
    model = build_model(config, SYMBOLS)
    watch_margins(model)
    engine = adapter.start(model, config, mesh)
    generator, losses, sent = torch.Generator().manual_seed(1), [], 0
    for step in range(STEPS):
        ids = torch.randint(0, SYMBOLS, (STREAMS, SEGMENT), generator=generator)
        targets = torch.randint(0, SYMBOLS, (STREAMS, SEGMENT), generator=generator)
        size = STREAMS // ranks
        here = slice(rank * size, (rank + 1) * size)
        plans = None
        if routers is not None:
            group = ids.view(ranks, size, SEGMENT)[list(mesh.ep_ranks)]
            gather = case.exchange is ExchangeKind.gather
            plans = tuple(plan_of(r, group, group[..., :1] * 0, K, gather=gather, chunks=case.chunks) for r in routers)
        before = 0 if engine.comm is None else engine.comm.sent_bytes
        deepspeed.comm.configure(enabled=step == STEPS - 1, prof_all=True, verbose=False, debug=False)
        out = engine.forward(ids[here], targets[here], None, Routing(K, plans))
        engine.backward(out.loss)
        engine.step()
        sent = 0 if engine.comm is None else engine.comm.sent_bytes - before
        loss = out.loss.detach().clone()
        dist.all_reduce(loss)
        losses.append(float(loss) / ranks)
    deepspeed.comm.configure(enabled=False)
    logged = sorted(deepspeed.comm.comm.comms_logger.comms_dict)
    deepspeed.comm.comm.comms_logger.comms_dict.clear()
    predicted = sum(plan.wire_bytes(16, 4) for plan in plans) if plans else 0
    times = None if engine.comm is None else tuple(engine.comm.take_times())
    return losses, dict(named(engine, mesh)), (sent, predicted), logged, times


def watch_margins(model):
    """Refuse a route that rounding could turn."""
    for block in model.blocks:
        if block.moe.router is not None:
            block.moe.router.register_forward_hook(check_margin)


def check_margin(_module, _inputs, live):
    top = live.logits_TE.sort(dim=1, descending=True).values
    assert (top[:, K - 1] - top[:, K]).min() > MARGIN


def named(engine, mesh):
    """Parameters; of experts each by itself under its global number."""
    for name, state in engine.read_state():
        value = state["weight"].numpy().copy()
        if ".experts." in name:
            for number, expert in zip(mesh.local_experts(4), value, strict=True):
                yield f"{name}@{number}", expert
        else:
            yield name, value


def several(rank, ranks, cases):
    """Run several cases in one group of processes, one engine after the other."""
    return [train(case, rank, ranks) for case in cases]


def difference(got, want):
    """Largest error of a loss or parameter against what it may be, by name."""
    largest = max(np.linalg.norm(value) for value in want[1].values())
    errors = {
        name: np.linalg.norm(value - want[1][name]) / (1e-6 * np.linalg.norm(want[1][name]) + 1e-7 * largest)
        for name, value in got[1].items()
    }
    errors["loss"] = np.abs(np.array(got[0]) / np.array(want[0], dtype=float) - 1).max() / 1e-6
    known = {name: float(error) if np.isfinite(error) else float("inf") for name, error in errors.items()}
    return max((error, name) for name, error in known.items())


def test_a_number_that_is_none_is_no_small_difference():
    good = [1.0, 2.0], {"a": np.ones(3), "b": np.ones(2)}
    assert difference(good, good)[0] == 0
    for losses, b in (([1.0, float("nan")], 1.0), ([1.0, 2.0], float("nan"))):
        assert difference((losses, {"a": np.ones(3), "b": np.full(2, b)}), good)[0] == float("inf")


@pytest.fixture(scope="module")
def one_rank():
    """What every number of ranks must equal, by router."""
    answers = run_ranks(several, 1, 1, [Case(router, expert_ranks=1) for router in ROUTERS])[0]
    return dict(zip(ROUTERS, answers, strict=True))


@pytest.fixture(scope="module")
def two_ranks():
    """Results of the cases, of each rank."""
    return run_ranks(several, 2, 2, [*CASES, MICRO, *cover(3)], seconds=1800)


def check(cases, answers, one_rank):
    for index, case in enumerate(cases):
        for answer in answers:
            assert difference(answer[index], one_rank[case.router]) < (1,), case
        experts = {name for answer in answers for name in answer[index][1] if "@" in name}
        assert len(experts) == 2 * 4 * 4, case  # layers, experts, parameters: none is missing


def test_the_cover_is_one():
    assert len(ALL) == 96
    for count, most in ((2, 20), (3, 40)):
        covered, whole = (set().union(*(together(case, count) for case in cases)) for cases in (cover(count), ALL))
        assert len(cover(count)) < most and covered == whole


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_train_like_one(two_ranks, one_rank):
    check(CASES, two_ranks, one_rank)
    check(cover(3), [answer[len(CASES) + 1 :] for answer in two_ranks], one_rank)


def on_four_ranks(cases):
    """Expert groups of 4 and of 2 by turns."""
    return [case._replace(expert_ranks=(4, 2)[i % 2]) for i, case in enumerate(cases)]


@pytest.mark.dist
@pytest.mark.slow
def test_four_ranks_train_like_one(one_rank):
    cases = on_four_ranks(cover(2))
    check(cases, run_ranks(several, 4, 4, cases), one_rank)


@pytest.mark.dist
@pytest.mark.slow
def test_balance_over_each_ranks_own_tokens_is_another_loss(two_ranks, one_rank):
    """Negative control of the global loss, and the other choice."""
    for answer in two_ranks:
        assert difference(answer[len(CASES)], one_rank["learned"]) > (100,)


@pytest.mark.dist
@pytest.mark.slow
def test_deepspeeds_logger_sees_the_exchange_and_the_wire_counts_it(two_ranks):
    for answer in two_ranks:
        _, _, (sent, predicted), logged, times = answer[0]
        # in parts recomputation repeats the whole forward exchange
        assert sent == 3 * predicted > 0 and "all_to_all_single" in logged
        assert min(times) >= 0 and sum(times) > 0
        assert "all_gather_into_tensor" in answer[1][3]
        assert answer[3][2:] == ((0, 0), answer[3][3], None)  # one rank in each expert group
