"""A live router under activation checkpointing: gradients are those of the choice that the forward pass made."""

import pytest
import torch
from torch.utils.checkpoint import CheckpointError, checkpoint, noop_context_fn

from foreroute.engine.config import KernelsConfig, ModelConfig, MoEConfig
from foreroute.engine.model.transformer_xl import TransformerXL
from foreroute.engine.moe import kept_plans
from foreroute.engine.moe import layer as layer_module
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.routing.live.learned import LearnedRouter
from foreroute.engine.routing.live_router import LiveRoute, gate_logits, masked_route, top_k_mask
from foreroute.engine.routing.plan import Routing

TOKENS, WIDTH, EXPERTS, K = 14, 6, 5, 2


class Flips(LearnedRouter):
    """Prefers the experts with the largest logits at one call, those with the smallest at the next; unequal in number,
    with weights that depend on the choice, and noise."""

    calls = 0
    least = -0.5  # of a logit that is chosen

    def forward(self, x_TD, k, carried=None):
        sign = (-1) ** self.calls
        self.calls += 1
        logits_TE = gate_logits(x_TD, self.gate_weight, self.gate_bias)
        logits_TE = logits_TE + 0.1 * torch.randn(logits_TE.shape, dtype=logits_TE.dtype)
        chosen_TE = top_k_mask(sign * logits_TE, k) & (logits_TE > self.least)
        weight_TE = logits_TE.masked_fill(~chosen_TE, 0.0)
        route = masked_route(chosen_TE, weight_TE, logits_TE).route
        return LiveRoute(route, logits_TE, carried=logits_TE if carried is None else logits_TE + carried)


@pytest.fixture
def flipping(monkeypatch):
    monkeypatch.setattr(layer_module, "live_method", lambda moe: Flips)


def moe():
    return MoEConfig(router="learned", experts=EXPERTS, expert_width=7, balance_loss=0.5, z_loss=0.1)


def gradients(module, calls):
    """Of a module whose router starts at call 0, and how often it was called."""
    for router in (part for part in module.modules() if isinstance(part, Flips)):
        router.calls = 0
    module.zero_grad()
    torch.manual_seed(2)
    calls()
    counts = {part.calls for part in module.modules() if isinstance(part, Flips)}
    return [p.grad.clone() for p in module.parameters()], counts


def layer_gradients(layer, x_TD, context_fn=None, backwards=1):
    x_TD = x_TD.clone().requires_grad_()

    def calls():
        call = Routing(K, None)
        if context_fn is None:
            out = layer(x_TD, call)
        else:
            out = checkpoint(layer, x_TD, call, use_reentrant=False, context_fn=context_fn)
        # dropout after the layer, as in a block, draws after the router did
        loss = (out.y_TD * out.y_TD).sum() + out.auxiliary_loss + out.carried.square().sum()
        for _ in range(backwards):
            loss.backward(retain_graph=True)

    found, counts = gradients(layer, calls)
    return [x_TD.grad / backwards, *(g / backwards for g in found)], counts


def a_layer():
    torch.manual_seed(1)
    layer = MoELayer(WIDTH, moe(), KernelsConfig(), 0).double()
    with torch.no_grad():
        layer.router.gate_weight.normal_()
    return layer, torch.randn(TOKENS, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("backwards", [1, 2])
def test_a_layer_keeps_the_choice(flipping, backwards):
    layer, x_TD = a_layer()
    want, _ = layer_gradients(layer, x_TD, backwards=backwards)
    got, counts = layer_gradients(layer, x_TD, kept_plans.contexts, backwards)
    assert counts == {1}  # and does not route again
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_without_keeping_a_flipping_router_has_wrong_gradients(flipping, monkeypatch):
    """The control; where the other choice has another number of rows, PyTorch notices."""
    layer, x_TD = a_layer()
    with pytest.raises(CheckpointError, match="different metadata"):
        layer_gradients(layer, x_TD, noop_context_fn)
    monkeypatch.setattr(Flips, "least", -torch.inf)
    want, _ = layer_gradients(layer, x_TD)
    got, counts = layer_gradients(layer, x_TD, noop_context_fn)
    assert counts == {2}
    assert (got[0] - want[0]).abs().max() > 1e-2


def model_gradients(model, recompute):
    model.recompute = recompute
    ids = torch.arange(2 * 7).view(2, 7) % 9

    def calls():
        model(ids, ids.roll(1), None, Routing(K, None)).loss.backward()

    return gradients(model, calls)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_model_that_recomputes_keeps_the_choice(flipping, monkeypatch, pre_norm):
    """Two layers; the second's router gets what the first's carries, and dropout draws as in the forward pass."""
    monkeypatch.setattr(Flips, "least", -torch.inf)
    torch.manual_seed(1)
    config = ModelConfig(2, 8, heads=2, head_width=4, memory=5, dropout=0.2, init_std=0.3, pre_norm=pre_norm)
    model = TransformerXL(config, moe(), KernelsConfig(), 9).double()
    want, _ = model_gradients(model, recompute=False)
    got, counts = model_gradients(model, recompute=True)
    assert counts == {1}
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    monkeypatch.setattr(kept_plans, "contexts", noop_context_fn)
    wrong, _ = model_gradients(model, recompute=True)
    assert max((a - b).abs().max() for a, b in zip(wrong, want, strict=True)) > 1e-3
