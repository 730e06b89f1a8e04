"""int8 matrices against the formula by plain loops."""

import pytest
import torch

from foreroute.engine.config import Activation, KernelsConfig, MoEConfig
from foreroute.engine.moe.experts import Experts
from foreroute.engine.moe.int8_weights import CHANNEL_DIM, hold_int8, holds_int8, quantised

E, F, D = 3, 5, 4


@pytest.mark.parametrize("name", CHANNEL_DIM)
def test_values_and_scales_equal_plain_loops(name):
    weight = torch.randn(F, D, generator=torch.Generator().manual_seed(0))
    weight[0], weight[:, 0] = 0, 0
    value, scale = quantised(weight, name)
    channels, held = (matrix if name != "w2" else matrix.T for matrix in (weight, value * scale))
    assert scale.shape == ((F, 1) if name != "w2" else (1, D)) and value.dtype == torch.int8
    for channel, found in zip(channels.tolist(), held.tolist(), strict=True):
        step = max(map(abs, channel)) / 127
        want = [step * round(weight / step) if step else 0.0 for weight in channel]
        assert found == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_the_example():
    value, scale = quantised(torch.tensor([[0.5, -1.0, 0.25]]), "w1")
    assert value.tolist() == [[64, -127, 32]] and scale.item() == pytest.approx(1 / 127)


@pytest.mark.parametrize("activation", [Activation.relu, Activation.swiglu])
def test_experts_hold_int8_alone(activation):
    """Their bytes are 1 for each value and 4 for each scale and bias; they read the values times the scales."""
    experts = Experts(D, MoEConfig(experts=E, expert_width=F, activation=activation), KernelsConfig())
    matrices = {name: getattr(experts, name).detach() for name in CHANNEL_DIM if getattr(experts, name) is not None}
    assert not holds_int8(experts)
    for name, matrix_EFD in matrices.items():
        value_EFD, scale = map(torch.stack, zip(*(quantised(matrix_FD, name) for matrix_FD in matrix_EFD), strict=True))
        hold_int8(experts, name, value_EFD, scale)
        assert torch.equal(getattr(experts, name), value_EFD * scale)
        assert not torch.equal(getattr(experts, name), matrix_EFD)
    held = sum(tensor.nbytes for tensor in [*experts.parameters(), *experts.buffers()])
    gates = len(matrices) - 2
    assert held == E * ((2 + gates) * F * D + 4 * ((1 + gates) * F + D) + 4 * (F + D))
    assert holds_int8(experts) and {name for name, _ in experts.named_parameters()} == {"b1", "b2"}
