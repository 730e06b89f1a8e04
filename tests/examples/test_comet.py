"""COMET's trees against a recursion from the root, and on ranks."""

import pytest
import torch

from examples.routers.comet import TreeRouter, leaf_shares, smooth_step
from foreroute.engine.config import MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.routing.plan import chosen_mask, dense_weights
from tests.examples.on_ranks import assert_two_ranks_train_like_one
from tests.references import comet as reference

TOKENS, WIDTH, TREES = 40, 5, 3


def router(experts, **options):
    torch.manual_seed(1)
    found = TreeRouter(WIDTH, MoEConfig(experts=experts, options={"trees": TREES, **options})).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(0.0, 0.5)
    return found


@pytest.mark.method
@pytest.mark.parametrize(("experts", "k", "gamma"), [(2, 1, 1.0), (4, 2, 1.0), (8, 3, 2.5), (4, 3, 0.1)])
def test_a_gate_equals_plain_recursion_with_every_gradient(experts, k, gamma):
    gate = router(experts, gamma=gamma, entropy=0.3)
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    live = gate(x_TD, k)
    got = dense_weights(live.route, experts), gate.loss(live, None)
    parts = (p.view(TREES, -1, *p.shape[1:]) for p in gate.parameters())
    trees = list(zip(*parts, strict=True))[:k]
    rows = [reference.weights(x_D, trees, gamma) for x_D in x_TD]
    want = torch.stack([weight_E for weight_E, _ in rows]), 0.3 * sum(entropy for _, entropy in rows) / TOKENS
    chosen_TE = chosen_mask(live.route, experts)
    assert torch.equal(chosen_TE, want[0] > 0) and (gamma > 1 or not chosen_TE.all())
    torch.testing.assert_close(want[0].sum(dim=1), torch.ones(TOKENS, dtype=torch.float64))
    factor_TE = torch.randn_like(got[0])
    inputs = [x_TD, *gate.parameters()]
    gradients = [torch.autograd.grad((w * factor_TE).sum() + loss, inputs) for w, loss in (got, want)]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.method
def test_a_tree_of_four_leaves_in_closed_form():
    s = smooth_step(torch.tensor([0.1, -0.2, 0.7], dtype=torch.float64), 1.0)
    assert s.tolist() == pytest.approx([-2 * 0.001 + 0.15 + 0.5, 2 * 0.008 - 0.3 + 0.5, 1.0])
    a, b, c = s.tolist()
    assert leaf_shares(s[None, None])[0, 0].tolist() == pytest.approx([a * b, a * (1 - b), (1 - a) * c, 0])
    assert leaf_shares(torch.tensor([[[0.5, 0.25, 1.0]]])).flatten().tolist() == [0.125, 0.375, 0.5, 0.0]


def test_exact_trees_choose_at_most_k():
    gate = router(8, gamma=1e-9)
    live = gate(torch.randn(TOKENS, WIDTH, dtype=torch.float64), 2)
    assert chosen_mask(live.route, 8).sum(dim=1).max() <= 2


@pytest.mark.parametrize(
    ("experts", "k", "message"),
    [(6, 1, r"moe\.experts=6: must be 2, 4, 8"), (4, 5, r"k=5: moe\.options\.trees=3 must be at least")],
)
def test_bad_input(experts, k, message):
    with pytest.raises(UserError, match=message):
        router(experts)(torch.zeros(2, WIDTH, dtype=torch.float64), k)


@pytest.mark.dist
def test_two_ranks_train_like_one():
    assert_two_ranks_train_like_one("comet:TreeRouter", options={"trees": 2, "gamma": 0.5})
