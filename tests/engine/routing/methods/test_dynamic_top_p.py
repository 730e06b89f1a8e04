"""The top-p router against plain loops, at its edges, and beside XMoE's rule."""

import pytest
import torch

from foreroute.engine.config import MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.routing.live.dynamic_top_p import DynamicTopPRouter
from foreroute.engine.routing.plan import Routing
from foreroute.engine.testing.live_layers import assert_equal_with_gradients, live_layer
from tests.references import dynamic_top_p as reference
from tests.references.live_layer import mixture

TOKENS, WIDTH, EXPERTS = 15, 6, 8


def config(balance_loss=0.3, z_loss=0.2, **options):
    return MoEConfig(
        router="dynamic_top_p",
        experts=EXPERTS,
        expert_width=5,
        balance_loss=balance_loss,
        z_loss=z_loss,
        options=options,
    )


@pytest.mark.method
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.9, 0.999999])
def test_a_layer_equals_plain_loops_with_every_gradient(threshold):
    layer = live_layer(WIDTH, config(threshold=threshold, entropy_loss=0.7))
    gate_ED, experts = layer.router.gate_weight, layer.experts
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    out = layer(x_TD, Routing(2, None))
    share_TE = reference.probabilities(x_TD, gate_ED)
    used = [reference.chosen(share_E, threshold) for share_E in share_TE]
    y_TD = mixture(x_TD, share_TE, used, experts.w1, experts.b1, experts.w2, experts.b2)
    loss = reference.loss(x_TD, gate_ED, threshold, balance=0.3, entropy=0.7, z=0.2)
    assert_equal_with_gradients((out.y_TD, out.auxiliary_loss), (y_TD, loss), [x_TD, *layer.parameters()])
    assert out.count_E.tolist() == [sum(e in row for row in used) for e in range(EXPERTS)]
    assert all(used)


@pytest.mark.method
@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.75])
def test_it_is_the_rule_of_xmoe(threshold):
    torch.manual_seed(0)
    router = DynamicTopPRouter(WIDTH, config(threshold=threshold))
    x_TD = 30 * torch.randn(200, WIDTH)
    route = router(x_TD, 2).route
    share_TE = reference.probabilities(x_TD, router.gate_weight).detach()
    want = [reference.chosen_by_xmoe(share_E, threshold) for share_E in share_TE]
    assert [row.nonzero().flatten().tolist() for row in route.used_TK] == want
    assert len({len(row) for row in want}) > 1  # tokens differ


def test_equal_probabilities_and_a_threshold_that_is_met_exactly():
    """Of 8 equal experts the fifth crosses 0.5: four sum up to it, but not beyond; the first of equals come first."""
    router = DynamicTopPRouter(WIDTH, config(threshold=0.5))
    route = router(torch.zeros(3, WIDTH), 1).route
    assert route.used_TK.tolist() == [[True] * 5 + [False] * 3] * 3
    assert torch.equal(route.weight_TK, torch.full((3, EXPERTS), 1 / 8))  # as they are, not divided by their sum


def test_k_changes_nothing():
    layer = live_layer(WIDTH, config())
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    found = [layer(x_TD, Routing(k, None)).y_TD for k in (1, EXPERTS)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 1.0}, r"moe.options.threshold=1.0: must be in \[0, 1\)"),
        ({"entropy_loss": -1.0}, "moe.options.entropy_loss=-1.0: must be at least 0"),
        ({"p": 0.5}, "moe.options.p: no such option"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(UserError, match=words):
        DynamicTopPRouter(WIDTH, config(**options))
