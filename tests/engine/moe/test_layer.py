"""What a layer adds to the loss, and what its dropout depends on; its rows are followed in test_layer_on_ranks.py."""

import math

import pytest
import torch

from foreroute.engine.config import KernelsConfig, MoEConfig, Router
from foreroute.engine.moe.layer import MoELayer
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
    layer = a_layer(Router.learned, balance_loss=balance, z_loss=z)
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
    layer = a_layer(Router.frozen, balance_loss=0.5, z_loss=0.5)
    assert layer(torch.randn(TOKENS, WIDTH), call()).auxiliary_loss is None


def test_a_shared_expert_is_added():
    plain, shared = a_layer(Router.frozen), a_layer(Router.frozen, shared_width=7)
    shared.load_state_dict(plain.state_dict(), strict=False)
    x_TD = torch.randn(TOKENS, WIDTH)
    want = plain(x_TD, call()).y_TD + shared.shared(x_TD)
    assert torch.allclose(shared(x_TD, call()).y_TD, want, atol=1e-6)


def test_the_shared_experts_dropout_is_that_of_an_expert_behind_all_others():
    """In fp64, by the mask's formula; PyTorch's generator has no part in it."""
    layer = a_layer(Router.frozen, dropout=0.25, shared_width=7).double()
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
        built = a_layer(Router.frozen, layer, dropout=0.5)
        dropout = built._dropout(x_TD, call(seed=step))
        assert (dropout.seed, dropout.rate, dropout.first_expert) == (seed, 0.5, 0)
        assert dropout.token_R.tolist() == list(range(TOKENS))
        assert layer_seeds(step, layer + 1)[layer].tolist() == list(seed_words(seed))
        assert built.eval()._dropout(x_TD, call()) is None
    assert a_layer(Router.frozen)._dropout(x_TD, call()) is None


def test_a_planned_router_needs_a_plan_of_its_k():
    with pytest.raises(ValueError, match="layer 3 has a planned router, k=2, and got no plan"):
        a_layer(Router.hashed, 3)(torch.zeros(TOKENS, WIDTH), call())
