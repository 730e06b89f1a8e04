"""THOR's two passes: the model's loss and gradients against plain fp64 loops over two separate passes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from foreroute.engine.config import KernelsConfig, ModelConfig, MoEConfig
from foreroute.engine.data.planned_batches import group_batch, plan_batch
from foreroute.engine.data.streams import Batch
from foreroute.engine.model.transformer_xl import TransformerXL
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.planned.stochastic import StochasticRouter

V, LAYERS, E = 7, 2, 4
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, V, (2, 6)))
TARGETS = torch.from_numpy(np.random.default_rng(1).integers(0, V, (2, 6)))


def build(dropout=0.0, consistency=3.0):
    torch.manual_seed(0)
    sizes = ModelConfig(LAYERS, 8, heads=2, head_width=4, memory=6, dropout=dropout, init_std=0.4)
    moe = MoEConfig(router="stochastic", experts=E, expert_width=6, consistency=consistency)
    kernels = KernelsConfig(masked_from_k=E + 1)
    return TransformerXL(sizes, moe, kernels, V).double()


def routing(passes=2, step=5):
    batch = Batch(IDS, TARGETS, IDS[:, :0], torch.arange(2), step, fresh=False)
    routers = [StochasticRouter(E, seed=1, index=i) for i in range(LAYERS)]
    return plan_batch(group_batch([batch]), 1, routers, passes=passes, dropout_seed=4, layers=LAYERS).routing


def plain_loss(first_TV, second_TV, targets_T, alpha):
    """THOR's published loss, divided by the number of tokens; numbers one by one."""
    total = 0.0
    for row, other, target in zip(first_TV, second_TV, targets_T.tolist(), strict=True):
        p, q = row.exp() / row.exp().sum(), other.exp() / other.exp().sum()
        differ = sum((p[v] - q[v]) * (p[v].log() - q[v].log()) for v in range(V))
        total = total - p[target].log() - q[target].log() + alpha / 2 * differ
    return total / len(targets_T)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.method
def test_loss_and_gradients_equal_two_separate_passes():
    model, both = build(), routing()
    out = model(IDS, TARGETS, None, both)
    one = model.logits(IDS, None, Routing(1, both.plans))
    two = model.logits(IDS, None, Routing(1, both.second.plans))
    rows = [logits.logits_BQV.flatten(0, 1) for logits in (one, two)]
    want = plain_loss(*rows, TARGETS.flatten(), 3.0)
    # logits are taken to fp32 before the losses, as in bf16 runs
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-6)
    nats = [torch.nn.functional.cross_entropy(r, TARGETS.flatten()).item() for r in rows]
    assert out.nll_BQ.mean().item() == pytest.approx(sum(nats) / 2, rel=1e-6)
    assert out.auxiliary_loss.item() == pytest.approx(want.item() - sum(nats), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(out.memory, one.memory, strict=True))
    assert not torch.equal(out.memory[1], two.memory[1])
    assert torch.equal(out.count_LE, one.count_LE + two.count_LE)
    got_d, want_d = gradients(model, out.loss), gradients(model, want)
    assert got_d.keys() == want_d.keys()
    for name, value in want_d.items():
        assert (got_d[name] - value).norm() <= 1e-5 * value.norm() + 1e-7, name


def test_equal_passes_agree_and_without_a_second_there_is_one_loss():
    """Negative control: the same plans twice leave nothing to agree on."""
    model, both = build(), routing()
    same = model(IDS, TARGETS, None, replace(both, second=replace(both, second=None)))
    alone = model(IDS, TARGETS, None, routing(passes=1))
    assert same.auxiliary_loss.item() == 0 and alone.auxiliary_loss.item() == 0
    assert same.loss.item() == pytest.approx(2 * alone.loss.item(), rel=1e-6)
    assert model(IDS, TARGETS, None, both).auxiliary_loss.item() > 0.01


def test_the_passes_drop_other_units():
    model, both = build(dropout=0.3), routing()
    model.dropout.eval()  # the experts' own, stateless dropout alone
    for block in model.blocks:
        block.dropout.eval()
        block.attention.dropout = 0.0
    out = model(IDS, TARGETS, None, replace(both, second=replace(both.second, plans=both.plans)))
    assert out.auxiliary_loss.item() > 1e-4


def test_each_step_and_pass_has_experts_of_its_own():
    found = set()
    for step in range(12):
        both = routing(step=step)
        for plans in (both.plans, both.second.plans):
            found.add(tuple(int(plan.count_E.argmax()) for plan in plans))
            assert all(plan.count_E.max() == 12 for plan in plans)
    assert len(found) > 8  # of 16 pairs of experts in two layers, 24 draws
