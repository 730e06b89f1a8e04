"""RMoE against plain loops through three layers, and on ranks with its cell in one place."""

import pytest
import torch

from examples.routers.rmoe import RecurrentRouter
from foreroute.engine.config import MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.routing.plan import dense_weights
from tests.examples.on_ranks import assert_two_ranks_train_like_one
from tests.references import rmoe as reference

LAYERS, TOKENS, WIDTH, HIDDEN, EXPERTS, K = 3, 7, 6, 5, 4, 2


def routers():
    torch.manual_seed(0)
    moe = MoEConfig(experts=EXPERTS, options={"hidden": HIDDEN})
    found = [RecurrentRouter(WIDTH, moe, layer).double() for layer in range(LAYERS)]
    for router in found[1:]:
        router.share(found[0])
    with torch.no_grad():
        for router in found:
            router.gate_weight.normal_()
    return found


@pytest.mark.method
def test_three_layers_equal_plain_loops_with_every_gradient():
    """The first layer's projection learns through the states of the others."""
    found = routers()
    x_LTD = torch.randn(LAYERS, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    got, want, carried, h_TH = [], [], None, torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    cell = found[0].cell
    shared = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    for router, x_TD in zip(found, x_LTD, strict=True):
        live = router(x_TD, K, carried)
        carried = live.carried
        got += [carried, dense_weights(live.route, EXPERTS)]
        tokens = zip(x_TD, h_TH, strict=True)
        h_TH = torch.stack([reference.state(x_D, h_H, router.project_weight, *shared) for x_D, h_H in tokens])
        want += [h_TH, torch.stack([reference.weights(h_H, router.gate_weight, K) for h_H in h_TH])]
    parameters = [p for router in found for p in router.parameters()]
    assert len(parameters) == 2 * LAYERS + 4  # one cell
    factors = [torch.randn_like(x) for x in got]
    gradients = []
    for result in (got, want):
        total = sum((x * factor).sum() for x, factor in zip(result, factors, strict=True))
        gradients.append(torch.autograd.grad(total, [x_LTD, *parameters]))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_the_layer_below_matters():
    """The control."""
    first, second, _ = routers()
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    carried = first(x_TD, K).carried
    assert not torch.allclose(second(x_TD, K, carried).logits_TE, second(x_TD, K).logits_TE, atol=1e-3)


def test_bad_options():
    with pytest.raises(UserError, match=r"moe\.options\.hidden=0: must be at least 1"):
        RecurrentRouter(WIDTH, MoEConfig(options={"hidden": 0}), 0)


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "recompute"), [(1, False), pytest.param(3, True, marks=pytest.mark.slow)])
def test_two_ranks_train_like_one_with_one_cell(stage, recompute):
    names = assert_two_ranks_train_like_one(
        "rmoe:RecurrentRouter", stage=stage, recompute=recompute, options={"hidden": 6}, z_loss=0.1
    )
    cells = [name for name in names if ".cell." in name]
    assert len(cells) == 4 and all(".0." in name for name in cells)
