"""Learning rate against torch's own schedulers, Adam against the formula written out in fp64."""

import math

import pytest
import torch
from torch import nn

from foreroute.engine.config import Decay, OptimConfig
from foreroute.engine.optim.adam import build_optimizer, comes_last, learning_rate


def test_cosine_equals_the_published_scheduler() -> None:
    config = OptimConfig(lr=2.5e-4, final_lr=1e-5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=1e-5)
    for step in range(50):
        want = optimizer.param_groups[0]["lr"]
        assert learning_rate(config, step, 50) == pytest.approx(want, rel=1e-9)
        optimizer.step()
        scheduler.step()
    assert learning_rate(config, 50, 50) == pytest.approx(1e-5)
    assert learning_rate(config, 60, 50) == pytest.approx(1e-5)  # past the end: no new rise


def test_warm_up_then_cosine_of_the_whole_run() -> None:
    config = OptimConfig(lr=0.4, warmup_steps=4, final_lr=0.0)
    got = [learning_rate(config, step, 8) for step in range(9)]
    assert got[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert got[4] == pytest.approx(0.2)  # half of the run is over: cosine of 90 degrees
    assert got[6] == pytest.approx(0.2 * (1 + math.cos(math.pi * 0.75)))
    assert got[8] == pytest.approx(0.0)


def test_constant() -> None:
    config = OptimConfig(lr=0.3, decay=Decay.constant, warmup_steps=2)
    assert [learning_rate(config, s, 5) for s in range(5)] == pytest.approx([0.15, 0.3, 0.3, 0.3, 0.3])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_equals_the_formula_in_fp64(decay: float) -> None:
    config = OptimConfig(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=decay)
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(37))
    want, m, v = param.detach().double(), torch.zeros(37).double(), torch.zeros(37).double()
    optimizer = build_optimizer([param], config)
    for t in range(1, 6):
        grad = torch.randn(37)
        param.grad = grad.clone()
        optimizer.step()
        want = want * (1 - config.lr * decay)
        m = 0.8 * m + 0.2 * grad.double()
        v = 0.95 * v + 0.05 * grad.double() ** 2
        want = want - config.lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
    assert (param.detach().double() - want).norm() / want.norm() < 1e-6


def test_same_steps_give_the_same_bits() -> None:
    def run() -> torch.Tensor:
        torch.manual_seed(1)
        param = nn.Parameter(torch.randn(10_007))
        optimizer = build_optimizer([param], OptimConfig(lr=0.01))
        for _ in range(4):
            param.grad = torch.randn(10_007)
            optimizer.step()
        return param.detach()

    assert torch.equal(run(), run())


def test_what_would_move_others_off_their_16_bytes_comes_last():
    """In fp32 and in bf16: 8 numbers of 2 bytes are 16 bytes."""
    sizes = range(1, 65)
    assert [size for size in sizes if not comes_last(size)] == [8, 16, 24, 32, 40, 48, 56, 64]
    assert comes_last(204) and comes_last(4) and not comes_last(256 * 1024)
