"""MH-MoE's layer against plain loops over sub-tokens, against the plain layer, and on two ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from examples.mh_moe import SubTokenLayer, SubTokenRouter
from foreroute.engine.config import ExchangeKind, KernelsConfig, MoEConfig, ParallelConfig, RouteWeights
from foreroute.engine.errors import UserError
from foreroute.engine.moe.exchange import build_exchange
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.planned_router import GroupTokens, RouterInputs
from foreroute.engine.testing.ranks import run_ranks

EXPERTS, SYMBOLS, WIDTH, K, TOKENS = 4, 9, 12, 2, 14
TEXT = np.random.default_rng(0).integers(0, SYMBOLS, 900).astype(np.uint8)
MOE = MoEConfig(experts=EXPERTS, expert_width=5, ngram=2, rows=81)
KERNELS = KernelsConfig(masked_from_k=EXPERTS + 1)


def router_of(heads, **moe):
    section = replace(MOE, options={"heads": heads}, **moe)
    return SubTokenRouter.build(section, RouterInputs(SYMBOLS, 1, 1, TEXT))[0]


def ids_of(ranks):
    return torch.randint(0, SYMBOLS, (ranks, 2, TOKENS // 2), generator=torch.Generator().manual_seed(3))


def tokens_of(ids_PBQ):
    return GroupTokens(ids_PBQ, torch.zeros(*ids_PBQ.shape[:2], 1, dtype=torch.int64))


def layer_of(heads, moe=MOE, **options):
    torch.manual_seed(0)
    layer = SubTokenLayer(WIDTH, heads, moe, KERNELS, 0, **options).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "experts" in name:
                parameter.normal_()
    return layer


def keys_of(ids_PBQ):
    """The two ids of each token's bigram, rank by rank; 0 before a segment."""
    before = torch.cat((torch.zeros_like(ids_PBQ[..., :1]), ids_PBQ[..., :-1]), dim=2)
    return (before * SYMBOLS + ids_PBQ).flatten().tolist()


def plain(layer, heads, x_TD, keys, router):
    """Loops over tokens, their parts and the experts of each part."""
    w1, b1, w2, b2 = (getattr(layer.moe.experts, name) for name in ("w1", "b1", "w2", "b2"))
    rows = []
    for x_D, key in zip(x_TD, keys, strict=True):
        parts = (layer.split.weight @ x_D + layer.split.bias).split(WIDTH // heads)
        joined = []
        for part, table in zip(parts, router.tables, strict=True):
            weight_K = table.logits_rE[key, :K].double().softmax(dim=0)
            out = torch.zeros_like(part)
            for weight, e in zip(weight_K, table.order_rE[key, :K].tolist(), strict=True):
                out = out + weight * (w2[e].T @ (w1[e] @ part + b1[e]).relu() + b2[e])
            joined.append(out)
        rows.append(layer.merge.weight @ torch.cat(joined) + layer.merge.bias)
    return torch.stack(rows)


@pytest.mark.method
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_a_layer_equals_plain_loops_with_every_gradient(heads):
    layer, router, ids = layer_of(heads), router_of(heads), ids_of(1)
    plan = router.plan(tokens_of(ids), K)
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    got = layer(x_TD, Routing(K, (plan,)))
    want_TD = plain(layer, heads, x_TD, keys_of(ids), router)
    torch.testing.assert_close(got.y_TD, want_TD, rtol=1e-6, atol=1e-7)  # weights of a plan are fp32
    leaves, factor_TD = [x_TD, *layer.parameters()], torch.randn_like(x_TD)
    gradients = [torch.autograd.grad((y * factor_TD).sum(), leaves) for y in (got.y_TD, want_TD)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert got.count_E.sum() == heads * TOKENS * K
    if heads > 1:  # control: the places of a token have experts of their own
        other = SubTokenRouter(router.tables[:1] * heads, MOE)
        assert not torch.allclose(plain(layer, heads, x_TD, keys_of(ids), other), want_TD)


@pytest.mark.method
def test_one_part_and_identities_are_the_plain_layer_bit_for_bit():
    layer, router = layer_of(1), router_of(1)
    for linear in (layer.split, layer.merge):
        nn.init.eye_(linear.weight)
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    routing = Routing(K, (router.plan(tokens_of(ids_of(1)), K),))
    assert isinstance(layer.moe, MoELayer)
    assert torch.equal(layer(x_TD, routing).y_TD, layer.moe(x_TD, routing).y_TD)


def test_parts_are_routed_by_any_live_router_and_send_no_more_bytes():
    layer = layer_of(3, replace(MOE, router="learned"))
    out = layer(torch.randn(TOKENS, WIDTH, dtype=torch.float64), Routing(K))
    assert out.count_E.sum() == 3 * TOKENS * K and out.auxiliary_loss is not None
    ids = ids_of(2)
    bytes_of = {
        heads: router_of(heads).place(Mesh(0, 2, 2)).plan(tokens_of(ids), EXPERTS).wire_bytes(WIDTH // heads, 4)
        for heads in (1, 3)
    }
    assert bytes_of[1] == bytes_of[3] == 2 * TOKENS * WIDTH * 4  # every part to every rank, and back


def on_ranks(rank, ranks):
    layer, router, ids = layer_of(2, dropout=0.3), router_of(2).place(Mesh(rank, ranks, ranks)), ids_of(2)
    if ranks > 1:
        local = EXPERTS // ranks
        layer.moe.keep_experts(range(rank * local, (rank + 1) * local))
        parallel = ParallelConfig(expert_ranks=ranks, exchange=ExchangeKind.tokens)
        layer.moe.connect(build_exchange(ExpertGroupComm(None), parallel))
    else:
        ids = ids.view(1, -1, TOKENS // 2)
    torch.manual_seed(1)
    x_TD = torch.randn(2 * TOKENS, WIDTH, dtype=torch.float64).chunk(ranks)[rank].requires_grad_()
    routing = Routing(K, (router.plan(tokens_of(ids), K),), torch.arange(2 * TOKENS), dropout_seed=7)
    y_TD = layer(x_TD, routing).y_TD
    w1, split = layer.moe.experts.w1, layer.split.weight
    return [t.detach().numpy() for t in (y_TD, *torch.autograd.grad((y_TD**2).sum(), (x_TD, w1, split)))]


@pytest.mark.dist
def test_two_ranks_are_as_one_with_dropout():
    (whole,), parts = run_ranks(on_ranks, 1, 1), run_ranks(on_ranks, 2, 2)
    joined = [np.concatenate(both) for both in zip(*(part[:3] for part in parts), strict=True)]
    for got, want in zip([*joined, parts[0][3] + parts[1][3]], whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_parts_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="heads=5: must divide the width, 12"):
        layer_of(5)
    assert router_of(2, weights=RouteWeights.uniform).plan(tokens_of(ids_of(1)), K).num_tokens == 2 * TOKENS
