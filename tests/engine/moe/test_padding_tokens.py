"""Padding has no expert: no row, no byte and a sum of 0, and nothing changes for the tokens beside it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from foreroute.engine.config import Builder, KernelsConfig, MoEConfig, RouteWeights
from foreroute.engine.finetune.classifier import Classifier
from foreroute.engine.finetune.sentences import Sentence, pad
from foreroute.engine.model.build import RunModel, build_model
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.plug_in.plans import Sequences, in_order, keep_to_texts
from foreroute.engine.plug_in.replace import replace_feed_forwards
from foreroute.engine.routing.methods import planned_method
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.planned_router import Draw, GroupTokens, RouterInputs
from foreroute.engine.testing.tiny_run import SYMBOLS, tiny_config

E, K, D, RANKS, TOKENS = 8, 3, 6, 2, 20
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, SYMBOLS, (RANKS, 2, TOKENS // 2)))
REAL = torch.from_numpy(np.random.default_rng(1).random((RANKS, 2, TOKENS // 2)) < 0.7)
MOE = MoEConfig(experts=E, expert_width=5, ngram=2, rows=SYMBOLS**2)
ARMS = {
    "hashed": {},
    "uniform": {"weights": RouteWeights.uniform},
    "live": {"weights": RouteWeights.live},
    "nulls": {"null_experts": 2, "copy_experts": 1},
    "fresh": {"router": "fresh"},
}


def routers(arm, *, ranks=1):
    moe = replace(MOE, **ARMS[arm])
    text = np.random.default_rng(2).integers(0, SYMBOLS, 500)
    built = [planned_method(moe).build(moe, RouterInputs(SYMBOLS, 1, 1, text))[0] for _ in range(ranks)]
    return moe, [router.place(Mesh(rank, ranks, ranks)) for rank, router in enumerate(built)]


def tokens(ids_PBQ=IDS, real_PBQ=REAL):
    ranks, batch = ids_PBQ.shape[:2]
    draw = Draw(np.arange(ids_PBQ.numel()).reshape(ranks, -1), 5)
    left_PBC = torch.zeros(ranks, batch, 1, dtype=torch.int64)
    return GroupTokens(ids_PBQ, left_PBC, None, draw, real_PBQ=real_PBQ)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("chunks", [1, 3])
def test_rows_are_those_of_real_tokens(arm, chunks):
    """On two ranks, against a loop over the tokens of the route without padding."""
    _, both = routers(arm, ranks=RANKS)
    route = both[0].route(tokens(real_PBQ=None), K)
    real = REAL.flatten().tolist()
    rows, crossing = [0] * E, [0] * RANKS
    for token, expert_K in enumerate(route.expert_TK.tolist()):
        if real[token]:
            found = {expert for expert in expert_K if expert < E}
            for expert in found:
                rows[expert] += 1
            home = token // TOKENS
            crossing[home] += sum(rank != home for rank in {expert * RANKS // E for expert in found})
    plans = [router.plan(tokens(), K, chunks=chunks) for router in both]
    assert [plan.wire_rows for plan in plans] == crossing
    assert all(plan.count_E.tolist() == rows for plan in plans)
    assert sum(chunk.rows.num_rows for plan in plans for chunk in plan.chunks) == sum(rows)
    whole = [router.plan(tokens(real_PBQ=None), K) for router in both]
    assert all(a.wire_rows < b.wire_rows for a, b in zip(plans, whole, strict=True))


@pytest.mark.parametrize("arm", ARMS)
def test_real_tokens_do_not_change(arm):
    """Outputs by no bit: the experts compute with whole numbers, so that no order of summation rounds; gradients to
    rounding. Of padding both are 0."""
    moe, (router,) = routers(arm)
    torch.manual_seed(0)
    layer = MoELayer(D, moe, KernelsConfig(), 0).double()
    for parameter in layer.experts.parameters():
        parameter.data = torch.randint(-3, 4, parameter.shape).double()
    real_T = REAL[0].flatten()
    x_TD, weight_TD = torch.randint(-9, 10, (2, TOKENS, D)).double()
    found = []
    for real_PBQ in (None, REAL[:1]):
        x_TD = x_TD.detach().requires_grad_()
        y_TD = layer(x_TD, Routing(K, (router.plan(tokens(IDS[:1], real_PBQ), K),))).y_TD
        (y_TD * weight_TD).sum().backward()
        found.append((y_TD.detach(), x_TD.grad))
    (y_TD, grad_TD), (got_TD, got_grad_TD) = found
    assert torch.equal(got_TD[real_T], y_TD[real_T]) and not got_TD[~real_T].any()
    torch.testing.assert_close(got_grad_TD[real_T], grad_TD[real_T], rtol=1e-12, atol=1e-12)
    assert not got_grad_TD[~real_T].any()
    assert y_TD[~real_T].any() and grad_TD[~real_T].any()  # the control: without the mask padding has experts


LIVE = {
    "frozen": {},
    "learned": {"z_loss": 0.1},
    "dynamic_top_p": {"balance_loss": 0.1},
    "sigmoid_bias": {},
    "adamoe": {"null_experts": 3, "balance_loss": 0.1},
    "moe_plus_plus": {"null_experts": 1, "copy_experts": 1, "constant_experts": 1, "balance_loss": 0.1},
}


@pytest.mark.parametrize("router", LIVE)
def test_live_routers_leave_padding_out(router):
    """Rows, losses and counts are those of the layer on the real tokens alone."""
    moe = replace(MOE, router=router, **LIVE[router])
    torch.manual_seed(0)
    layer = MoELayer(D, moe, KernelsConfig(), 0).double()
    real_T, x_TD = REAL[0].flatten(), torch.randn(TOKENS, D).double()
    alone, got = layer(x_TD[real_T], Routing(K)), layer(x_TD, Routing(K, real_T=real_T))
    torch.testing.assert_close(got.y_TD[real_T], alone.y_TD, rtol=1e-12, atol=1e-14)
    assert not got.y_TD[~real_T].any() and torch.equal(got.count_E, alone.count_E)
    whole = layer(x_TD, Routing(K))
    assert int(whole.count_E.sum()) > int(got.count_E.sum())
    if alone.auxiliary_loss is not None:
        torch.testing.assert_close(got.auxiliary_loss, alone.auxiliary_loss)
        assert not torch.isclose(whole.auxiliary_loss, alone.auxiliary_loss)


@pytest.mark.parametrize("router", ["hashed", "learned"])
def test_fine_tuning_routes_no_padding(router):
    config = tiny_config()
    config = replace(config, moe=replace(config.moe, router=router, builder=Builder.random))
    method, built = planned_method(config.moe), None
    if method is not None:
        built = method.build(config.moe, RouterInputs(SYMBOLS, 1, config.num_tables, np.zeros(1, np.uint8)))
    model = build_model(config, SYMBOLS)
    classifier, seen = Classifier(RunModel(config, None, model, built)).eval(), []
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.register_forward_hook(lambda _, __, output: seen.append(int(output.count_E.sum())))
    sentences = [Sentence(np.arange(length).astype(np.uint8) % SYMBOLS, 0) for length in (3, 9, 14)]
    classifier(pad(sentences), 2)
    assert seen == [2 * (3 + 9 + 14)] * 2


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_real_ids_are_in_the_order_of_the_ids(first, documents):
    ids = torch.arange(1, 13).view(3, 4)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    numbers = torch.zeros_like(ids) if documents else None
    sequences = Sequences(ids, None, mask, numbers, first)
    kept, _ = keep_to_texts(sequences, ids, torch.zeros(3, 1, dtype=torch.int64))
    real_T = in_order(sequences, mask != 0)
    assert torch.equal(real_T.view(kept.shape), kept != 0) and int(real_T.sum()) == 10


def test_a_plug_in_model_routes_no_padding():
    torch.manual_seed(0)
    feed_forward = nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))
    model = nn.Sequential(nn.Embedding(SYMBOLS, D), feed_forward)
    moe = replace(MOE, builder=Builder.random)
    experts = replace_feed_forwards(model, "1", width=D, vocab_size=SYMBOLS, moe=moe, k=K, seed=1)
    mask = torch.ones(2, TOKENS // 2, dtype=torch.int64)
    mask[0, 7:], mask[1, :2] = 0, 0
    ids = IDS[0] * mask
    found = []
    for given in (None, mask):
        with torch.no_grad(), experts.planned(ids, mask=given) as plans:
            found.append(model(ids))
        assert int(plans.plans[0].count_E.sum()) == K * (20 if given is None else 15)
    torch.testing.assert_close(found[0][mask > 0], found[1][mask > 0])
    assert found[0][mask == 0].any() and not found[1][mask == 0].any()
