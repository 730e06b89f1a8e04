"""Weights of a learned gate over planned experts against plain loops over Python floats."""

import math

import pytest
import torch

from foreroute.engine.config import MoEConfig, RouteWeights
from foreroute.engine.config.enums import Gate
from foreroute.engine.moe.gate import LiveGate, gate_weights
from foreroute.engine.routing.plan import SetRows

PLAIN = {
    Gate.softmax: math.exp,
    Gate.sigmoid: lambda x: 1 / (1 + math.exp(-x)),
    Gate.sqrt_softplus: lambda x: math.sqrt(math.log1p(math.exp(x))),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", list(Gate), ids=lambda kind: kind.name)
def test_weights_equal_plain_loops(kind, normalised, masked):
    """A row without experts has no weights, and its gradient is finite."""
    generator = torch.Generator().manual_seed(0)
    logits_RK = (2 * torch.randn(30, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    used_RK = torch.rand(30, 4, generator=generator) < 0.6 if masked else None
    weight_RK = gate_weights(logits_RK, used_RK, kind, normalised=normalised)
    rows = used_RK.tolist() if masked else [[True] * 4] * 30
    assert not masked or [False] * 4 in rows
    for logits, used, weights in zip(logits_RK.tolist(), rows, weight_RK.tolist(), strict=True):
        parts = [PLAIN[kind](x) if u else 0.0 for x, u in zip(logits, used, strict=True)]
        total = sum(parts) if normalised or kind is Gate.softmax else 1
        assert weights == pytest.approx([part / (total or 1) for part in parts], rel=1e-12)
    weight_RK.square().sum().backward()
    assert logits_RK.grad.isfinite().all() and logits_RK.grad.any()
    assert not masked or not logits_RK.grad[~used_RK].any()


@pytest.mark.parametrize("kind", list(Gate), ids=lambda kind: kind.name)
def test_large_logits_have_finite_weights_and_gradients(kind):
    logits_RK = torch.tensor([[-1e4, -200.0], [200.0, -200.0], [1e4, 200.0]], requires_grad=True)
    weight_RK = gate_weights(logits_RK, None, kind, normalised=True)
    weight_RK.square().sum().backward()
    assert weight_RK.isfinite().all() and logits_RK.grad.isfinite().all()


def make_gate(**options):
    torch.manual_seed(0)
    return LiveGate(6, MoEConfig(experts=5, weights=RouteWeights.live, **options))


def test_weights_of_expert_rows_are_found_in_the_rows_sets():
    gate = make_gate(gate=Gate.sigmoid, gate_normalised=False, gate_scale=2.5)
    with torch.no_grad():
        gate.weight.mul_(50)
    received_RD = torch.randn(3, 6)
    sets = SetRows(torch.tensor([[4, 0], [2, 1], [0, 3]]), None, torch.tensor([1, 4, 3]))
    found = gate(received_RD, sets)
    rows, weights = received_RD.double().tolist(), gate.weight.double().tolist()
    for weight, (row, expert) in zip(found.tolist(), ((0, 0), (2, 0), (1, 1)), strict=True):
        logit = sum(x * w for x, w in zip(rows[row], weights[expert], strict=True))
        assert weight == pytest.approx(2.5 * PLAIN[Gate.sigmoid](logit), rel=1e-5)


def test_a_bf16_gate_has_an_fp32_product():
    gate = make_gate().bfloat16()
    received_RD = torch.randn(9, 6).bfloat16()
    sets = SetRows(torch.arange(5).repeat(9, 1), None, torch.arange(45))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gate(received_RD, sets)
    exact = (received_RD.double() @ gate.weight.double().T).softmax(dim=1).flatten()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_a_gate_without_rows_has_a_gradient_of_zeros():
    gate = make_gate()
    empty = torch.zeros(0, dtype=torch.int64)
    gate(torch.zeros(0, 6), SetRows(empty.reshape(0, 2), None, empty)).sum().backward()
    assert torch.equal(gate.weight.grad, torch.zeros(5, 6))


def test_the_normalised_weight_of_a_single_expert_is_one():
    logits_RK = torch.randn(8, 1, requires_grad=True)
    for kind in Gate:
        torch.testing.assert_close(gate_weights(logits_RK, None, kind, normalised=True), torch.ones(8, 1))
