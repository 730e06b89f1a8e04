"""The router of DeepSeek-V3 against plain loops; its bias on several ranks, resumed, and on a skewed input."""

import pytest
import torch

from foreroute.engine.config import KernelsConfig, MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.moe.layer import MoELayer, update_routers
from foreroute.engine.routing.live.sigmoid_bias import SigmoidBiasRouter
from foreroute.engine.routing.losses import chosen_counts
from foreroute.engine.routing.plan import Routing
from tests.references import sigmoid_bias as reference
from tests.references.live_layer import mixture

TOKENS, WIDTH, EXPERTS = 15, 6, 8


def config(**options):
    return MoEConfig(router="sigmoid_bias", experts=EXPERTS, expert_width=5, options=options)


def a_layer(**options):
    torch.manual_seed(3)
    layer = MoELayer(WIDTH, config(**options), KernelsConfig(), 0).double()
    for parameter in layer.parameters():
        parameter.data.normal_()
    layer.router.bias.normal_(0.0, 0.2)
    return layer


@pytest.mark.method
@pytest.mark.parametrize(
    ("k", "options"),
    [
        (2, {}),
        (3, {"scale": 2.5}),
        (EXPERTS, {}),
        (1, {"groups": 8, "group_limit": 1}),
        (2, {"groups": 4, "group_limit": 1}),
        (3, {"groups": 4, "group_limit": 2, "scale": 2.5}),
        (4, {"groups": 2, "group_limit": 1}),
        (3, {"groups": 2, "group_limit": 2}),
    ],
)
def test_a_layer_equals_plain_loops_with_every_gradient(k, options):
    layer = a_layer(**options)
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    out = layer(x_TD, Routing(k, None))
    inputs = [x_TD, *layer.parameters()]
    cotangent = torch.randn_like(out.y_TD)
    got = torch.autograd.grad(out.y_TD, inputs, cotangent)
    loops = {"groups": options.get("groups", 1), "limit": options.get("group_limit", 1)}
    used, weight_TE = reference.route(
        x_TD, layer.router.gate_weight, layer.router.bias, k, scale=options.get("scale", 1.0), **loops
    )
    experts = layer.experts
    want = mixture(x_TD, weight_TE, used, experts.w1, experts.b1, experts.w2, experts.b2)
    torch.testing.assert_close(out.y_TD, want, rtol=1e-10, atol=1e-12)
    for a, b in zip(got, torch.autograd.grad(want, inputs, cotangent), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert out.count_E.tolist() == [sum(e in row for row in used) for e in range(EXPERTS)]
    assert out.auxiliary_loss is None


def test_the_bias_changes_the_choice_alone():
    """The control: with another bias other experts are chosen; those that stay have the weights of the scores alone."""
    layer = a_layer()
    router, x_TD = layer.router, torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    before = router(x_TD, 2).route
    router.bias.add_(torch.linspace(-2, 2, EXPERTS))
    after = router(x_TD, 2).route
    assert not torch.equal(before.expert_TK, after.expert_TK)
    assert (after.expert_TK == EXPERTS - 1).sum() > (before.expert_TK == EXPERTS - 1).sum()
    router.bias.fill_(100.0)
    unbiased = SigmoidBiasRouter(WIDTH, config())
    unbiased.gate_weight.data = router.gate_weight.data
    for a, b in zip(router(x_TD, 2).route[:2], unbiased(x_TD, 2).route[:2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.method
def test_a_step_moves_the_bias_as_published():
    layer = a_layer(update=0.25)
    bias = layer.router.bias.clone()
    for counts in ([5, 3, 4, 0, 8, 4, 4, 4], [4] * 8, [1, 0, 0, 0, 0, 0, 0, 0]):
        want = reference.update(bias.tolist(), counts, 0.25)
        update_routers(layer, torch.tensor([counts], dtype=torch.float64))
        torch.testing.assert_close(layer.router.bias, torch.tensor(want, dtype=layer.router.bias.dtype))
        bias = layer.router.bias.clone()
    assert not layer.router.bias.requires_grad and "router.bias" in layer.state_dict()


@pytest.mark.method
def test_a_skewed_input_becomes_balanced():
    """All tokens prefer the same experts at first; the bias alone brings the busiest expert below 1.1 of the mean."""
    torch.manual_seed(0)
    router = SigmoidBiasRouter(16, config(update=0.01))
    router.gate_weight.data.normal_()
    direction_D = torch.randn(16)

    def ratio(update=True):
        x_TD = torch.randn(2048, 16) + direction_D
        count_E = chosen_counts(router(x_TD, 2).route, EXPERTS).double()
        if update:
            router.after_step(count_E)
        return (count_E.max() / count_E.mean()).item()

    skewed = ratio()
    for _ in range(300):
        ratio()
    router.options.update = 0.001  # smaller, as training ends
    for _ in range(100):
        ratio()
    assert skewed > 2
    assert max(ratio(update=False) for _ in range(3)) < 1.1


@pytest.mark.parametrize(
    ("options", "k", "words"),
    [
        ({"groups": 3}, 1, "moe.options.groups=3: must divide moe.experts=8"),
        ({"groups": 2, "group_limit": 3}, 1, "moe.options.group_limit=3: must be at most moe.options.groups=2"),
        ({"groups": 4, "group_limit": 1}, 3, "k=3: must be at most 2, the experts of moe.options.group_limit=1"),
        ({"scale": 0}, 1, "moe.options.scale=0: must be above 0"),
        ({"bias": 1}, 1, "moe.options.bias: no such option of moe.router=sigmoid_bias"),
    ],
)
def test_wrong_options(options, k, words):
    with pytest.raises(UserError, match=words):
        SigmoidBiasRouter(WIDTH, config(**options))(torch.zeros(2, WIDTH), k)
