"""DynMoE's gate, its straight-through gradient and its losses against plain loops; experts that come and go; ranks."""

import pytest
import torch

from foreroute.engine.config import KernelsConfig, MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.routing.plan import Routing, chosen_mask, dense_weights
from tests.examples.on_ranks import assert_two_ranks_train_like_one
from tests.references import dynmoe as reference

NAME = "examples.routers.dynmoe:TopAnyRouter"
TOKENS, WIDTH, EXPERTS = 24, 5, 4


def layer(**options):
    torch.manual_seed(5)
    moe = MoEConfig(router=NAME, experts=EXPERTS, expert_width=3, balance_loss=0.2, options=options)
    found = MoELayer(WIDTH, moe, KernelsConfig(), 0).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_()
    return found


def tokens():
    torch.manual_seed(6)
    return torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)


@pytest.mark.method
@pytest.mark.parametrize("start", [2, 4])
def test_the_gate_and_its_losses_equal_plain_loops_with_every_gradient(start):
    router, x_TD = layer(start=start).router, tokens()
    with torch.no_grad():
        router.gate.threshold.fill_(0.1 * start - 0.15)  # some tokens have no expert
    live = router(x_TD, 2)
    weights = router.gate.direction, router.gate.threshold
    sign_TE = torch.stack([reference.signs(x_D, *weights, range(start)) for x_D in x_TD])
    used_T = sign_TE.sum(dim=1)
    assert used_T.min() == 0 and used_T.max() > 1
    assert torch.equal(chosen_mask(live.route, EXPERTS), sign_TE > 0)
    got = dense_weights(live.route, EXPERTS), router.loss(live, None)
    want = (
        torch.stack([reference.weights(sign_E) for sign_E in sign_TE]) * (sign_TE > 0),
        0.2 * reference.loss(sign_TE, weights[0], range(start)),
    )
    factor_TE = torch.randn_like(got[0])
    gradients = [torch.autograd.grad((w * factor_TE).sum() + loss, [x_TD, *weights]) for w, loss in (got, want)]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def test_at_evaluation_every_token_has_an_expert():
    router, x_TD = layer(start=3).router, tokens()
    with torch.no_grad():
        router.gate.threshold.copy_(torch.tensor([0.2, 0.4, 0.5, -9.0]))
    before_TE = chosen_mask(router(x_TD, 2).route, EXPERTS)
    route = router.eval()(x_TD, 2).route
    used_TE = chosen_mask(route, EXPERTS)
    direction_ED = torch.nn.functional.normalize(router.gate.direction, dim=1)[:3]
    for t in range(TOKENS):
        want = before_TE[t].clone()
        if not want.any():
            want[(direction_ED @ x_TD[t]).argmax()] = True
        assert torch.equal(used_TE[t], want)
    assert torch.allclose(dense_weights(route, EXPERTS).sum(dim=1), torch.ones((), dtype=torch.float64))


@pytest.mark.method
def test_unused_experts_go_and_one_comes_for_tokens_without_any():
    """Tokens that have no part in either have the same output, bit for bit."""
    moe, x_TD = layer(start=3, interval=2), tokens().detach()
    router = moe.router
    with torch.no_grad():
        router.gate.threshold.copy_(torch.tensor([0.2, 9.0, 0.3, 0.0]))  # nobody reaches expert 1
    before = moe(x_TD, Routing(2, None))
    used_TE = router(x_TD, 2).logits_TE > 0
    missed_T = ~used_TE.any(dim=1)
    assert before.count_E[1] == 0 and before.count_E[0] > 0 and before.count_E[2] > 0 and missed_T.sum() > 0
    for step in range(2):
        assert router.active_E.tolist() == [True, True, True, False], step
        router.after_step(before.count_E.double())
    assert router.active_E.tolist() == [True, True, True, False] and router.set_E.tolist() == [0, 1, 0, 0]
    after = moe(x_TD, Routing(2, None))
    mean_D = x_TD[missed_T].sum(dim=0)
    direction_ED, threshold_E = router.gate(router.set_E, router.set_D)
    torch.testing.assert_close(direction_ED[1], mean_D / mean_D.norm())
    assert threshold_E[1] == 0 and not router.set_E.any() and after.count_E[1] > 0
    kept_T = ~(router(x_TD, 2).logits_TE > 0)[:, 1]
    assert torch.equal(after.y_TD[kept_T], before.y_TD[kept_T]) and not torch.equal(after.y_TD, before.y_TD)
    for _ in range(2):  # nobody missed, nobody at expert 0
        router.step_missed_D.zero_()
        router.after_step(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert router.active_E.tolist() == [False, True, True, False] and not router.set_E.any()


def test_bad_options():
    with pytest.raises(UserError, match=r"moe\.options\.start=5: must be at most moe\.experts=4, the largest number"):
        layer(start=5)


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "recompute"), [(1, False), pytest.param(3, True, marks=pytest.mark.slow)])
def test_two_ranks_train_like_one(stage, recompute):
    """Experts come for tokens of both ranks; without the loss, which is that of a rank's micro-batch."""
    options = {"start": 1, "interval": 3}
    names = assert_two_ranks_train_like_one(
        "dynmoe:TopAnyRouter", stage=stage, recompute=recompute, options=options, balance_loss=0.0
    )
    assert {int(value.sum()) for name, value in names.items() if name.endswith("active_E")} != {1}
