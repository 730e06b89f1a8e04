"""EvoMoE's gate against plain loops, from dense to sparse, and on ranks."""

import pytest
import torch

from examples.routers.evomoe import DenseToSparseRouter
from foreroute.engine.config import MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.routing.losses import chosen_counts
from foreroute.engine.routing.plan import chosen_mask, dense_weights
from tests.examples.on_ranks import assert_two_ranks_train_like_one
from tests.references import evomoe as reference

TOKENS, WIDTH, EXPERTS = 30, 5, 6


def router(**options):
    torch.manual_seed(2)
    found = DenseToSparseRouter(WIDTH, MoEConfig(experts=EXPERTS, balance_loss=0.4, options=options)).double()
    with torch.no_grad():
        found.gate_weight.normal_()
    return found


def tokens():
    torch.manual_seed(3)
    return torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)


@pytest.mark.method
@pytest.mark.parametrize("steps", [0, 4, 10, 25])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_gate_equals_plain_loops_with_every_gradient(steps, noise):
    gate, x_TD = router(start=2.0, end=0.3, steps=10, threshold=0.05, noise=noise), tokens()
    for _ in range(steps):
        gate.after_step(None)
    torch.manual_seed(4)
    live = gate(x_TD, 2)
    torch.manual_seed(4)
    noise_TE = -noise * torch.empty(TOKENS, EXPERTS, dtype=torch.float64).exponential_().log()
    tau = reference.temperature(steps, 2.0, 0.3, 10)
    want_TE = torch.stack(
        [reference.weights(x, gate.gate_weight, n, tau, 0.05) for x, n in zip(x_TD, noise_TE, strict=True)]
    )
    probability_TE = torch.stack([(gate.gate_weight @ x_D).exp() for x_D in x_TD])
    probability_TE = probability_TE / probability_TE.sum(dim=1, keepdim=True)
    got = dense_weights(live.route, EXPERTS), gate.loss(live, chosen_counts(live.route, EXPERTS))
    want = want_TE, 0.4 * reference.balance(probability_TE, (want_TE > 0).double())
    assert torch.equal(chosen_mask(live.route, EXPERTS), want_TE > 0)
    factor_TE = torch.randn_like(want_TE)
    gradients = [torch.autograd.grad((w * factor_TE).sum() + loss, [x_TD, gate.gate_weight]) for w, loss in (got, want)]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*gradients)


@pytest.mark.method
def test_from_dense_to_sparse():
    """At a large temperature all experts, equally; then fewer and fewer, one in the end."""
    gate, x_TD = router(start=1e4, end=0.01, steps=50), tokens()
    used = []
    for step in range(60):
        live = gate(x_TD, 1)
        used.append(int(chosen_mask(live.route, EXPERTS).sum()) / TOKENS)
        if step == 0:
            weight_TE = dense_weights(live.route, EXPERTS)
            torch.testing.assert_close(weight_TE, torch.full_like(weight_TE, 1 / EXPERTS), atol=0.01, rtol=0)
        gate.after_step(None)
    assert used[0] == EXPERTS and 1 <= used[-1] < 1.3


def test_at_evaluation_the_k_most_likely():
    gate, x_TD = router().eval(), tokens()
    route = gate(x_TD, 2).route
    probability_TE = (x_TD @ gate.gate_weight.T).softmax(dim=1)
    want_TK, expert_TK = probability_TE.sort(dim=1, descending=True)
    assert torch.equal(route.expert_TK, expert_TK[:, :2])
    torch.testing.assert_close(route.weight_TK, want_TK[:, :2])


@pytest.mark.parametrize(("name", "value"), [("end", 0), ("threshold", 1), ("steps", 0), ("noise", -1)])
def test_bad_options(name, value):
    with pytest.raises(UserError, match=rf"moe\.options\.{name}={value}: must be"):
        router(**{name: value})


@pytest.mark.dist
def test_two_ranks_train_like_one():
    """Without noise, which each rank draws for itself."""
    options = {"noise": 0.0, "steps": 8, "end": 0.02, "threshold": 0.1}
    names = assert_two_ranks_train_like_one("evomoe:DenseToSparseRouter", options=options)
    assert {int(value) for name, value in names.items() if name.endswith("router.steps")} == {10}
