"""Constants, copies and nulls against plain loops (MoE++, arXiv 2410.07348, eq. 3 to 5)."""

import math

import pytest
import torch

from foreroute.engine.config import MoEConfig
from foreroute.engine.moe.zero_experts import ZeroExperts, zero_experts


def make(constants, copies, nulls):
    torch.manual_seed(0)
    return ZeroExperts(5, MoEConfig(constant_experts=constants, copy_experts=copies, null_experts=nulls)).double()


@pytest.mark.parametrize("kinds", [(2, 1, 1), (1, 0, 0), (0, 2, 1), (0, 0, 2), (3, 2, 0)], ids=str)
def test_outputs_equal_plain_loops(kinds):
    constants, copies, _ = kinds
    layer, generator = make(*kinds), torch.Generator().manual_seed(1)
    x_TD = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    weight_TJ = torch.rand(7, sum(kinds), generator=generator, dtype=torch.float64)
    weight_TJ[torch.rand(weight_TJ.shape, generator=generator) < 0.4] = 0
    found = layer(x_TD, weight_TJ)
    for x, weights, y in zip(x_TD.tolist(), weight_TJ.tolist(), found.tolist(), strict=True):
        want = [sum(weights[constants : constants + copies]) * value for value in x]
        for c in range(constants):
            scores = [sum(a * b for a, b in zip(row, x, strict=True)) for row in layer.mix[c].tolist()]
            one, two = (math.exp(s) / sum(map(math.exp, scores)) for s in scores)
            both = zip(x, layer.vector[c].tolist(), strict=True)
            want = [sum_ + weights[c] * (one * value + two * v) for sum_, (value, v) in zip(want, both, strict=True)]
        assert y == pytest.approx(want, rel=1e-12, abs=1e-15)


def test_a_layer_has_them_only_if_asked_for():
    assert zero_experts(5, MoEConfig()) is None
    assert zero_experts(5, MoEConfig(null_experts=1)) is None


def test_bf16_tokens_are_added_up_in_fp32():
    layer = make(2, 2, 0)
    x_TD, weight_TJ = torch.randn(50, 5).bfloat16(), torch.rand(50, 4)
    exact = layer(x_TD.double(), weight_TJ.double())
    found = layer.float()(x_TD, weight_TJ)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)
