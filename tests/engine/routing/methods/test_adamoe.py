"""AdaMoE against plain loops: null experts cost no row, and are balanced as one."""

import pytest
import torch

from foreroute.engine.config import MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.routing.live.adamoe import AdaMoERouter
from foreroute.engine.routing.live_router import LiveRoute
from foreroute.engine.routing.plan import Route, Routing
from foreroute.engine.testing.live_layers import assert_equal_with_gradients, live_layer
from tests.references import adamoe as reference
from tests.references.live_layer import mixture

TOKENS, WIDTH, EXPERTS = 15, 6, 5


def config(nulls=3, **moe):
    options = {"balance_loss": 0.3, "z_loss": 0.2, **moe}
    return MoEConfig(router="adamoe", experts=EXPERTS, expert_width=5, null_experts=nulls, **options)


@pytest.mark.method
@pytest.mark.parametrize(("k", "nulls"), [(1, 3), (2, 1), (3, 6), (EXPERTS + 2, 2)])
def test_a_layer_equals_plain_loops_with_every_gradient(k, nulls):
    layer = live_layer(WIDTH, config(nulls))
    gate_XD, experts = layer.router.gate_weight, layer.experts
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    out = layer(x_TD, Routing(k, None))
    used, weight_TE, _ = reference.route(x_TD, gate_XD, k, EXPERTS)
    y_TD = mixture(x_TD, weight_TE, used, experts.w1, experts.b1, experts.w2, experts.b2)
    loss = reference.loss(x_TD, gate_XD, k, EXPERTS, balance=0.3, z=0.2)
    assert_equal_with_gradients((out.y_TD, out.auxiliary_loss), (y_TD, loss), [x_TD, *layer.parameters()])
    assert out.count_E.tolist() == [sum(e in row for row in used) for e in range(EXPERTS)]
    assert k > nulls or any(not row for row in used)  # tokens without an expert


@pytest.mark.method
def test_null_experts_have_their_mean_load_alone():
    """It does not matter which null expert tokens take; it does which expert."""
    router = AdaMoERouter(WIDTH, config(z_loss=0.0))
    torch.manual_seed(0)
    logits_TX = torch.randn(4, EXPERTS + 3)
    live = LiveRoute(Route(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1)), logits_TX)
    counts = torch.tensor([[1, 2, 0, 1, 1, 3, 0, 0, 4], [1, 2, 0, 1, 1, 0, 1, 2, 4], [2, 1, 0, 1, 1, 3, 0, 0, 4]])
    first, other_null, other_expert = (router.loss(live, count_X).item() for count_X in counts)
    assert first == other_null != other_expert


def test_it_needs_null_experts():
    with pytest.raises(UserError, match=r"moe.null_experts=0: must be at least 1"):
        AdaMoERouter(WIDTH, config(0))
