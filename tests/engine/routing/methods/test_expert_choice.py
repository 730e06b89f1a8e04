"""Expert choice against plain loops: every expert has exactly as many rows as it may."""

import pytest
import torch

from foreroute.engine.config import MoEConfig
from foreroute.engine.routing.live.expert_choice import ExpertChoiceRouter
from foreroute.engine.routing.plan import Routing
from foreroute.engine.testing.live_layers import assert_equal_with_gradients, live_layer
from foreroute.engine.testing.read_backs import ReadBacks
from tests.references import expert_choice as reference
from tests.references.live_layer import mixture

WIDTH, EXPERTS = 6, 4
MOE = MoEConfig(router="expert_choice", experts=EXPERTS, expert_width=5)


@pytest.mark.method
@pytest.mark.parametrize(
    ("tokens", "k", "capacity"), [(16, 2, 8), (15, 1, 3), (7, 3, 5), (2, 1, 1), (1, 1, 1), (5, EXPERTS, 5)]
)
def test_a_layer_equals_plain_loops_with_every_gradient(tokens, k, capacity):
    layer = live_layer(WIDTH, MOE)
    gate_ED, experts = layer.router.gate_weight, layer.experts
    x_TD = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    out = layer(x_TD, Routing(k, None))
    used, share_TE = reference.route(x_TD, gate_ED, capacity)
    want = mixture(x_TD, share_TE, used, experts.w1, experts.b1, experts.w2, experts.b2)
    assert_equal_with_gradients([out.y_TD], [want], [x_TD, *layer.parameters()])
    assert out.count_E.tolist() == [capacity] * EXPERTS
    assert out.auxiliary_loss is None


def test_tokens_have_any_number_of_experts():
    router = ExpertChoiceRouter(WIDTH, MOE)
    torch.manual_seed(0)
    router.gate_weight.data.normal_()
    route = router(torch.randn(64, WIDTH), 1).route
    counts = set(route.used_TK.sum(dim=1).tolist())
    assert {0, 1, 2} <= counts
    assert route.rows == route.used_TK.sum() == 64


def test_a_token_to_the_right_changes_the_choice():
    """It is not causal, as its description says."""
    layer = live_layer(WIDTH, MOE)
    x_TD = torch.randn(12, WIDTH, dtype=torch.float64)
    other_TD = x_TD.clone()
    other_TD[-4:] = 5 * torch.randn(4, WIDTH, dtype=torch.float64)
    a, b = (layer(x, Routing(1, None)).y_TD[:-4] for x in (x_TD, other_TD))
    assert not torch.equal(a, b)


def in_routing(reads):
    """The kernels of a CPU read their arguments, too."""
    return [read for read in reads.found if read.place.startswith("routing/")]


def test_one_rank_reads_nothing_back():
    layer = live_layer(WIDTH, MOE)
    x_TD = torch.randn(16, WIDTH, dtype=torch.float64)
    with ReadBacks() as reads:
        layer(x_TD, Routing(2, None))
    assert not in_routing(reads)
    dynamic = live_layer(WIDTH, MoEConfig(router="dynamic_top_p", experts=EXPERTS, expert_width=5))
    with ReadBacks() as reads:  # the control
        dynamic(x_TD, Routing(2, None))
    assert in_routing(reads)
