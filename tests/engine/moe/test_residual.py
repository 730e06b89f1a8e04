"""The learned residual is that of DeepSpeed's own layer, MoE(use_residual=True); against plain loops:
test_mixing_on_ranks.py."""

import pytest
import torch
from deepspeed.moe.layer import MoE
from torch import nn

from foreroute.engine.config import KernelsConfig, MoEConfig
from foreroute.engine.moe.feed_forward import FeedForward
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.routing.plan import Routing

TOKENS, WIDTH, INNER, K = 9, 6, 7, 2


class Ours(nn.Module):
    """The same experts without the residual, in the place of DeepSpeed's."""

    l_aux = exp_counts = None

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x_TD, _used):
        return self.experts(x_TD, Routing(K)).y_TD


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.method
def test_the_residual_is_that_of_deepspeed():
    torch.manual_seed(0)
    options = {"router": "frozen", "experts": 4, "expert_width": 5}
    ours = MoELayer(WIDTH, MoEConfig(**options, shared_width=INNER, residual=True), KernelsConfig(), 0).double()
    plain = MoELayer(WIDTH, MoEConfig(**options), KernelsConfig(), 0).double()
    plain.load_state_dict({n: v for n, v in ours.state_dict().items() if not n.startswith(("shared", "coefficient"))})
    theirs = MoE(
        WIDTH, FeedForward(WIDTH, INNER, MoEConfig().activation, 0.0), num_experts=1, use_residual=True
    ).double()
    theirs.deepspeed_moe = Ours(plain)
    theirs.mlp.load_state_dict(ours.shared.state_dict())
    theirs.coefficient.load_state_dict(ours.coefficient.state_dict())
    x_TD, cotangent = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    found = []
    for layer in (lambda x: ours(x, Routing(K)).y_TD, lambda x: theirs(x)[0]):
        leaf = x_TD.clone().requires_grad_()
        y_TD = layer(leaf)
        y_TD.backward(cotangent)
        found.append((y_TD.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1])
    got = gradients(ours)
    want = {f"shared.{name}": g for name, g in gradients(theirs.mlp).items()}
    want |= {f"coefficient.{name}": g for name, g in gradients(theirs.coefficient).items()} | gradients(plain)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(found[0][0], plain(x_TD, Routing(K)).y_TD + ours.shared(x_TD))  # negative control
