"""MoE++ against plain loops through two layers: zero, copy and constant experts, and the gate's residual."""

import pytest
import torch

from foreroute.engine.config import MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.routing.live.moe_plus_plus import MoEPlusPlusRouter
from foreroute.engine.routing.plan import Routing
from foreroute.engine.testing.live_layers import assert_equal_with_gradients, live_layer
from tests.references import moe_plus_plus as reference
from tests.references.live_layer import mixture

TOKENS, WIDTH, EXPERTS = 15, 6, 5


def config(constants=2, copies=1, nulls=1, **options):
    return MoEConfig(
        router="moe_plus_plus",
        experts=EXPERTS,
        expert_width=5,
        constant_experts=constants,
        copy_experts=copies,
        null_experts=nulls,
        balance_loss=0.3,
        z_loss=0.2,
        options=options,
    )


def loops(layer, x_TD, k, before_TX, tau):
    """Output, loss, logits and choice of one layer."""
    router, experts, zero, moe = layer.router, layer.experts, layer.zero_experts, layer.moe_config
    gate = router.hidden_weight, router.gate_weight
    logits_TX = reference.logits(x_TD, *gate, before_TX, router.residual_weight)
    chosen, weight_TX = reference.route(logits_TX, k, moe.null_experts)
    used = [[i for i in row if i < EXPERTS] for row in chosen]
    y_TD = mixture(x_TD, weight_TX, used, experts.w1, experts.b1, experts.w2, experts.b2)
    if zero.constants or zero.copies:
        vectors = (zero.vector, zero.mix) if zero.constants else (None, None)
        y_TD = y_TD + reference.without_rows(x_TD, chosen, weight_TX, EXPERTS, zero.constants, zero.copies, *vectors)
    loss = reference.loss(logits_TX, chosen, EXPERTS, tau, balance=0.3, z=0.2)
    return y_TD, loss, logits_TX, chosen


@pytest.mark.method
@pytest.mark.parametrize(
    ("k", "kinds", "gate_hidden", "tau"),
    [
        (2, (2, 1, 1), 2, 0.75),
        (2, (2, 1, 1), 0, 0.1),
        (1, (1, 0, 2), 1, 1.0),
        (3, (0, 2, 0), 1, 0.0),
        (9, (2, 1, 1), 1, 0.5),
    ],
)
def test_two_layers_equal_plain_loops_with_every_gradient(k, kinds, gate_hidden, tau):
    """Among the gradients are those of v, Wc and G; the first layer's gate learns through the second's, too."""
    moe = config(*kinds, gate_hidden=gate_hidden, tau=tau)
    layers = [live_layer(WIDTH, moe, number) for number in range(2)]
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    got, want, inner_TD, loop_TD, carried, before_TX = [], [], x_TD, x_TD, None, None
    for layer in layers:
        layer.moe_config = moe
        out = layer(inner_TD, Routing(k, None), carried)
        y_TD, loss, before_TX, chosen = loops(layer, loop_TD, k, before_TX, tau)
        got += [out.y_TD, out.auxiliary_loss, out.carried]
        want += [y_TD, loss, before_TX]
        inner_TD, loop_TD, carried = 0.1 * out.y_TD + x_TD, 0.1 * y_TD + x_TD, out.carried
        assert out.count_E.tolist() == [sum(e in row for row in chosen) for e in range(EXPERTS)]
    parameters = [p for layer in layers for p in layer.parameters()]
    assert_equal_with_gradients(got, want, [x_TD, *parameters])
    names = {name for name, _ in layers[1].named_parameters()}
    assert ("zero_experts.vector" in names) == (kinds[0] > 0) and "router.residual_weight" in names
    assert layers[0].router.residual_weight is None


def test_the_residual_matters():
    """The control."""
    layers = [live_layer(WIDTH, config(), number) for number in range(2)]
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    first = layers[0](x_TD, Routing(2, None))
    with_it, without = (layers[1](x_TD, Routing(2, None), carried).y_TD for carried in (first.carried, None))
    assert not torch.allclose(with_it, without)


def test_it_needs_experts_without_rows():
    with pytest.raises(UserError, match=r"moe.router=moe_plus_plus: needs constant, copy or null experts"):
        MoEPlusPlusRouter(WIDTH, config(0, 0, 0))
    with pytest.raises(UserError, match=r"moe.options.tau=-1: must be at least 0"):
        MoEPlusPlusRouter(WIDTH, config(tau=-1))
