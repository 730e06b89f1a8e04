"""Live routers trained through DeepSpeed on 2 and 4 gloo ranks, experts shared out or not, against one rank.

No dropout. The optimizer is linear in the gradient, which shows every gradient with its scale (Adam as usual would hide
it). Routers whose choice depends on a rank's other tokens have no such equality (tests/engine/moe/test_live_masks.py).
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import distributed as dist

from foreroute.engine.checkpoint import save_load as checkpoint
from foreroute.engine.config import MoEConfig, ParallelConfig
from foreroute.engine.config.enums import ExchangeKind
from foreroute.engine.model.build import build_model
from foreroute.engine.moe.layer import update_routers
from foreroute.engine.optim import deepspeed_engine as adapter
from foreroute.engine.parallel.cpu_group import GlooGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Routing
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.tiny_run import EXPERTS, SYMBOLS, tiny_config

STEPS, K, STREAMS, SEGMENT = 4, 2, 4, 8
ROUTERS: dict[str, dict[str, Any]] = {
    "sigmoid_bias": {"options": {"update": 0.1, "groups": 2, "group_limit": 2, "scale": 1.5}},
    "dynamic_top_p": {"balance_loss": 0.5, "options": {"threshold": 0.7, "entropy_loss": 0.3}},
    "adamoe": {"balance_loss": 0.5, "null_experts": 3},
    "moe_plus_plus": {"balance_loss": 0.5, "constant_experts": 1, "copy_experts": 1, "null_experts": 1},
}


class Case(NamedTuple):
    router: str
    expert_ranks: int = 1
    stage: int = 1
    chunks: int = 1
    exchange: ExchangeKind = ExchangeKind.tokens
    options: tuple[tuple[str, Any], ...] = ()  # of section train


RECOMPUTE = (("recompute", True),)
TWO = [
    Case("sigmoid_bias", 2),
    Case("sigmoid_bias", 1, 3, options=(("accumulation", 2),)),
    Case("sigmoid_bias", 2, 3, 3, options=RECOMPUTE),
    Case("dynamic_top_p", 2, 3, options=RECOMPUTE),
    Case("dynamic_top_p", 2, 0, 3, ExchangeKind.gather),
    Case("adamoe", 2, 2, 3, options=RECOMPUTE),
    Case("moe_plus_plus", 2, 3, options=RECOMPUTE),
    Case("moe_plus_plus", 1, 2),
]
FOUR = [Case("sigmoid_bias", 2, 2), Case("sigmoid_bias", 4, 3, 3, options=RECOMPUTE), Case("moe_plus_plus", 4)]


def configure(case):
    config = tiny_config(case.stage, **dict(case.options))
    moe = MoEConfig(router=case.router, experts=EXPERTS, expert_width=12, **ROUTERS[case.router])
    parallel = ParallelConfig(expert_ranks=case.expert_ranks, exchange=case.exchange, chunks=case.chunks)
    return replace(config, moe=moe, parallel=parallel)


def start(case, rank, ranks):
    adapter.build_optimizer = lambda params, _: torch.optim.Adam(params, 500.0, (0.0, 0.999), 1e3, fused=True)
    mesh = Mesh(rank, ranks, case.expert_ranks)
    model = build_model(configure(case), SYMBOLS)
    return adapter.start(model, configure(case), mesh), mesh


def train(case, rank, ranks, folder):
    """Mean losses over the ranks, parameters, of experts each by itself, and the routers' buffers."""
    engine, mesh = start(case, rank, ranks)
    if ranks == 1:
        watch_margins(engine.module)
    generator, losses = torch.Generator().manual_seed(1), []
    accumulation = dict(case.options).get("accumulation", 1)
    for _ in range(STEPS):
        both = torch.randint(0, SYMBOLS, (2, STREAMS, SEGMENT), generator=generator)
        total, count_LE = torch.zeros(()), 0
        for ids, targets in zip(*(x.chunk(accumulation) for x in both), strict=True):
            size = len(ids) // ranks
            here = slice(rank * size, (rank + 1) * size)
            out = engine.forward(ids[here], targets[here], None, Routing(K))
            engine.backward(out.loss)
            total += out.loss.detach() / accumulation / ranks
            count_LE = count_LE + out.count_LE.double()
        engine.step()
        dist.all_reduce(count_LE)
        update_routers(engine.module, count_LE / case.expert_ranks)
        dist.all_reduce(total)
        losses.append(float(total))
    if folder is not None:
        state = checkpoint.TrainingState(step=STEPS, cursor=STEPS, rng=torch.get_rng_state())
        checkpoint.save(folder, engine, state, facts={}, keep=1, cpu_group=GlooGroup(dist.group.WORLD))
    return losses, weights(engine, mesh), buffers(engine)


def watch_margins(model):
    """Refuse a choice that rounding could turn: with a router's input disturbed it is the same."""
    generator = torch.Generator().manual_seed(0)

    def check(router, inputs, live):
        x_TD, *rest = inputs
        with torch.no_grad():
            noise_TD = torch.randn(x_TD.shape, generator=generator)
            other = router.forward(x_TD * (1 + 1e-6 * noise_TD), *rest).route
        assert torch.equal(live.route.expert_TK, other.expert_TK)
        assert live.route.used_TK is None or torch.equal(live.route.used_TK, other.used_TK)

    for block in model.blocks:
        block.moe.router.register_forward_hook(check)


def weights(engine, mesh):
    found = {}
    for name, state in engine.read_state():
        value = state["weight"].numpy().copy()
        if ".experts." in name:
            found |= {f"{name}@{e}": part for e, part in zip(mesh.local_experts(EXPERTS), value, strict=True)}
        else:
            found[name] = value
    return found


def buffers(engine):
    return {name: buffer.numpy().copy() for name, buffer in engine.module.named_buffers()}


def several(rank, ranks, cases, folder=None):
    """Run the cases in one group of processes; the first one is saved."""
    return [train(case, rank, ranks, folder if case is cases[0] else None) for case in cases]


def resume(rank, ranks, case, folder):
    """The parameters and buffers of a run that goes on."""
    engine, mesh = start(case, rank, ranks)
    group = GlooGroup(dist.group.WORLD)
    path, _ = checkpoint.find_newest(folder, group)
    checkpoint.load(path, engine, cpu_group=group)
    return weights(engine, mesh), buffers(engine)


@pytest.fixture(scope="module")
def one_rank():
    answers = run_ranks(several, 1, 1, [Case(router) for router in ROUTERS])[0]
    return dict(zip(ROUTERS, answers, strict=True))


def check(cases, answers, one_rank):
    for answer in answers:
        for case, (losses, got, got_buffers) in zip(cases, answer, strict=True):
            want_losses, want, want_buffers = one_rank[case.router]
            largest = max(np.linalg.norm(value) for value in want.values())
            assert losses == pytest.approx(want_losses, rel=2e-6), case
            for name, value in got.items():
                error = np.linalg.norm(value - want[name])
                assert error <= 1e-5 * np.linalg.norm(want[name]) + 1e-6 * largest, (case, name, error)
            assert any("router" in name for name in got)
            for name, value in got_buffers.items():  # steps of one size: the same to the last bit
                assert np.array_equal(value, want_buffers[name]), (case, name)
            assert (case.router == "sigmoid_bias") == any(name.endswith("router.bias") for name in got_buffers)


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_train_like_one_and_are_resumed(one_rank, tmp_path):
    answers = run_ranks(several, 2, 2, TWO, tmp_path)
    check(TWO, answers, one_rank)
    bias = one_rank["sigmoid_bias"][2]["blocks.0.moe.router.bias"]
    assert len(np.unique(np.abs(bias))) > 1  # it moved, and not alike for all
    for ranks in (1, 2):
        case = Case("sigmoid_bias", ranks, 2)
        for rank, (parameters, found) in enumerate(run_ranks(resume, ranks, ranks, case, tmp_path)):
            for name, value in found.items():
                assert np.array_equal(value, answers[0][0][2][name]), (rank, name)
            for name, value in parameters.items():
                saved = next(answer[0][1][name] for answer in answers if name in answer[0][1])
                assert np.array_equal(value, saved), (rank, name)


@pytest.mark.dist
@pytest.mark.slow
def test_four_ranks_train_like_one(one_rank):
    check(FOUR, run_ranks(several, 4, 4, FOUR), one_rank)


@pytest.mark.dist
def test_the_bias_matters(one_rank):
    """The control: without updates of the bias the losses are others."""
    losses, _, _ = run_ranks(without_updates, 1, 1)[0]
    assert losses[0] == one_rank["sigmoid_bias"][0][0]
    assert abs(losses[-1] - one_rank["sigmoid_bias"][0][-1]) > 1e-4


def without_updates(rank, ranks):
    ROUTERS["sigmoid_bias"]["options"]["update"] = 0.0  # in this rank's process alone
    return train(Case("sigmoid_bias"), rank, ranks, None)
