"""What a layer adds to the loss, and what its dropout depends on; its rows are followed in test_layer_on_ranks.py."""

import math

import pytest
import torch

from foreroute.engine.config import KernelsConfig, MoEConfig, RouteWeights
from foreroute.engine.moe.layer import MoELayer, update_routers
from foreroute.engine.routing.live_router import LiveRouter, masked_route
from foreroute.engine.routing.plan import Routing, layer_seeds
from foreroute.kernels import Dropout, keep_mask, row_hash, unit_hash
from foreroute.kernels.dropout import seed_words

TOKENS, WIDTH, EXPERTS, K = 12, 6, 4, 2


def a_layer(router, number=0, dropout=0.0, **moe):
    torch.manual_seed(1)
    options = {"experts": EXPERTS, "expert_width": 5, "router": router, **moe}
    return MoELayer(WIDTH, MoEConfig(**options), KernelsConfig(), number, dropout=dropout)


def call(*, seed=0, plan=None):
    return Routing(K, None if plan is None else (plan,), torch.arange(TOKENS), seed)


@pytest.mark.parametrize(("balance", "z"), [(0.5, 0.0), (0.0, 0.25), (0.5, 0.25), (0.0, 0.0)])
def test_a_learned_router_adds_its_losses_times_their_weights(balance, z):
    """Switch Transformer's and ST-MoE's, in Python's floats."""
    layer = a_layer("learned", balance_loss=balance, z_loss=z)
    with torch.no_grad():
        layer.router.gate_weight.mul_(50)
    x_TD = torch.randn(TOKENS, WIDTH)
    out = layer(x_TD, call())
    logits = (x_TD.double() @ layer.router.gate_weight.double().T).tolist()
    chosen = [sorted(range(EXPERTS), key=lambda e, row=row: -row[e])[:K] for row in logits]
    counts = [sum(e in picked for picked in chosen) for e in range(EXPERTS)]
    sums = [sum(map(math.exp, row)) for row in logits]
    share = [
        sum(math.exp(row[e]) / total for row, total in zip(logits, sums, strict=True)) / TOKENS for e in range(EXPERTS)
    ]
    balance_loss = EXPERTS * sum(c / (TOKENS * K) * p for c, p in zip(counts, share, strict=True))
    z_loss = sum(math.log(total) ** 2 for total in sums) / TOKENS
    assert out.count_E.tolist() == counts
    assert out.auxiliary_loss.item() == pytest.approx(balance * balance_loss + z * z_loss, rel=1e-5)


def test_a_frozen_router_adds_no_loss():
    layer = a_layer("frozen", balance_loss=0.5, z_loss=0.5)
    assert layer(torch.randn(TOKENS, WIDTH), call()).auxiliary_loss is None


def test_a_shared_expert_is_added():
    plain, shared = a_layer("frozen"), a_layer("frozen", shared_width=7)
    shared.load_state_dict(plain.state_dict(), strict=False)
    x_TD = torch.randn(TOKENS, WIDTH)
    want = plain(x_TD, call()).y_TD + shared.shared(x_TD)
    assert torch.allclose(shared(x_TD, call()).y_TD, want, atol=1e-6)


def test_the_shared_experts_dropout_is_that_of_an_expert_behind_all_others():
    """In fp64, by the mask's formula; PyTorch's generator has no part in it."""
    layer = a_layer("frozen", dropout=0.25, shared_width=7).double()
    shared, x_TD = layer.shared, torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(found))
        both = layer(x_TD, call(seed=seed)).y_TD
        layer.shared = None
        found.append(both - layer(x_TD, call(seed=seed)).y_TD)
        layer.shared = shared
    dropout = Dropout(0.25, 5 * 1_000_003, torch.arange(TOKENS))
    want = torch.zeros_like(x_TD)
    for token in range(TOKENS):
        hidden = (shared.w1(x_TD[token])).relu()
        row = row_hash(dropout, torch.tensor([token]), EXPERTS)
        keep = keep_mask(row, unit_hash(7), dropout.threshold)[0]
        want[token] = shared.w2(hidden * keep / 0.75)
    torch.testing.assert_close(found[0], want)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_each_layer_and_step_has_dropout_of_its_own():
    """A million layers have numbers between those of two steps; the numbers stay, as a run that goes on asks for them
    again."""
    x_TD = torch.zeros(TOKENS, WIDTH)
    for layer, step, seed in ((0, 0, 0), (2, 0, 2), (0, 7, 7_000_021), (3, 7, 7_000_024)):
        built = a_layer("frozen", layer, dropout=0.5)
        dropout = built._dropout(x_TD, call(seed=step))
        assert (dropout.seed, dropout.rate, dropout.first_expert) == (seed, 0.5, 0)
        assert dropout.token_R.tolist() == list(range(TOKENS))
        assert layer_seeds(step, layer + 1)[layer].tolist() == list(seed_words(seed))
        assert built.eval()._dropout(x_TD, call()) is None
    assert a_layer("frozen")._dropout(x_TD, call()) is None


def test_a_planned_router_needs_a_plan_of_its_k():
    with pytest.raises(ValueError, match="layer 3 has a planned router, k=2, and got no plan"):
        a_layer("hashed", 3)(torch.zeros(TOKENS, WIDTH), call())


def test_a_learned_residual_weighs_experts_and_the_shared_expert():
    """PR-MoE, in Python's floats: a softmax of two numbers for each token."""
    plain, mixed = a_layer("frozen"), a_layer("frozen", shared_width=7, residual=True)
    mixed.load_state_dict(plain.state_dict(), strict=False)
    x_TD = torch.randn(TOKENS, WIDTH)
    experts, shared = plain(x_TD, call()).y_TD, mixed.shared(x_TD)
    found = mixed(x_TD, call()).y_TD
    weight, bias = mixed.coefficient.weight.tolist(), mixed.coefficient.bias.tolist()
    for token, x in enumerate(x_TD.tolist()):
        scores = [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        one, two = (math.exp(score) / sum(map(math.exp, scores)) for score in scores)
        torch.testing.assert_close(found[token], one * experts[token] + two * shared[token])


class Varied(LiveRouter):
    """Token t has experts 0 .. t mod 3 - 1 and a copy; carries a count of layers, and counts its steps' rows."""

    uses = ("copy_experts",)

    def __init__(self, width, moe, layer):
        super().__init__(width, moe, layer)
        self.register_buffer("seen_E", torch.zeros(moe.experts, dtype=torch.float64))

    def forward(self, x_TD, k, carried=None):
        tokens = len(x_TD)
        chosen_TE = torch.arange(self.experts) < (torch.arange(tokens) % 3)[:, None]
        live = masked_route(chosen_TE, torch.full(chosen_TE.shape, 0.5), torch.zeros(chosen_TE.shape))
        carried = torch.zeros(tokens, 1) if carried is None else carried
        return live._replace(carried=carried + 1, column_weight_TJ=torch.full((tokens, 1), 2.0))

    def after_step(self, count_E):
        self.seen_E += count_E


OWN = {"router": f"{__name__}:Varied", "copy_experts": 1}


def test_a_users_live_router_with_any_number_of_experts_and_one_without_rows():
    layer = a_layer(**OWN)
    x_TD = torch.randn(TOKENS, WIDTH)
    out = layer(x_TD, call(), torch.full((TOKENS, 1), 4.0))
    experts = layer.experts
    for token, x_D in enumerate(x_TD):
        want = 2 * x_D
        for e in range(token % 3):
            want = want + 0.5 * (experts.w2[e].T @ (experts.w1[e] @ x_D + experts.b1[e]).relu() + experts.b2[e])
        torch.testing.assert_close(out.y_TD[token], want)
    assert out.count_E.tolist() == [8, 4, 0, 0] and out.auxiliary_loss is None
    assert torch.equal(out.carried, torch.full((TOKENS, 1), 5.0))
    assert torch.equal(layer(x_TD, call()).carried, torch.ones(TOKENS, 1))
    assert a_layer("frozen")(x_TD, call()).carried is None


def test_a_gate_is_for_planned_experts_whose_weights_a_router_leaves_to_it():
    live = {"weights": RouteWeights.live}
    gates = [a_layer(router, **live).gate for router in ("hashed", "fresh", "frozen")]
    assert [gate is not None for gate in gates] == [True, False, False]
    assert a_layer("hashed").gate is None


def test_routers_change_their_state_by_the_counts_of_their_own_layer():
    layers = torch.nn.ModuleList([a_layer(number=0, **OWN), a_layer("hashed", 1), a_layer(number=2, **OWN)])
    update_routers(layers, torch.arange(12, dtype=torch.float64).reshape(3, EXPERTS))
    assert [layers[n].router.seen_E.tolist() for n in (0, 2)] == [[0, 1, 2, 3], [8, 9, 10, 11]]
