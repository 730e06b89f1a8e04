"""Redundancy, load and routing change against plain loops; a control for each."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from foreroute.engine.config import Activation, Config, KernelsConfig, MoEConfig, RouteWeights, Split, Tokens
from foreroute.engine.data.corpus import PreparedCorpus
from foreroute.engine.data.tokens.byte_values import ByteVocab
from foreroute.engine.evaluation import expert_analysis as analysis
from foreroute.engine.model.build import RunModel, build_model
from foreroute.engine.moe.experts import Experts
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.routers import hashed_of
from foreroute.engine.testing.tiny_run import EXPERTS, LAYERS, SEGMENT, SYMBOLS, tiny_config

WIDTH, COUNT, TOKENS = 6, 4, 9


def experts(seed=0, **options):
    torch.manual_seed(seed)
    made = Experts(WIDTH, MoEConfig(experts=COUNT, expert_width=5, **options), KernelsConfig(masked_from_k=COUNT + 1))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def seen(made, chosen_TE, weight_TE=None):
    torch.manual_seed(3)
    chosen_TE = torch.tensor(chosen_TE).bool()
    weight_TE = chosen_TE / chosen_TE.sum(1, keepdim=True) if weight_TE is None else torch.tensor(weight_TE)
    return analysis.LayerSeen(made, torch.randn(len(chosen_TE), WIDTH), weight_TE, chosen_TE)


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_output_similarity_is_the_mean_over_pairs_and_tokens():
    made = experts()
    layer = seen(made, [[1] * COUNT] * TOKENS)
    total = []
    for x_D in layer.hidden_TD.double():
        outputs = [
            made.w2[e].double().T @ torch.relu(made.w1[e].double() @ x_D + made.b1[e].double()) + made.b2[e].double()
            for e in range(COUNT)
        ]
        total += [cosine(a, b) for a, b in itertools.combinations(outputs, 2)]
    assert analysis.output_similarity(layer) == pytest.approx(sum(total) / len(total), abs=1e-6)
    first = sum(total[:6]) / 6
    assert analysis.output_similarity(layer, tokens=1) == pytest.approx(first, abs=1e-6)
    assert abs(first - sum(total) / len(total)) > 0.01  # the limit on tokens is seen


def test_equal_experts_are_wholly_alike_and_opposite_ones_not():
    made = experts()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    layer = seen(made, [[1] * COUNT] * TOKENS)
    assert analysis.output_similarity(layer) == pytest.approx(1, abs=1e-6)
    assert analysis.weight_similarity(made) == pytest.approx(1, abs=1e-6)
    with torch.no_grad():  # half of the experts say the opposite: 2 pairs of 6 are alike, 4 opposite
        made.w2[:2] *= -1
        made.b2[:2] *= -1
    assert analysis.output_similarity(layer) == pytest.approx(-1 / 3, abs=1e-6)


def test_permuted_units_change_the_weights_similarity_alone():
    made = experts()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
        order = torch.tensor([3, 0, 4, 1, 2])
        made.w1[1], made.b1[1], made.w2[1] = made.w1[1, order], made.b1[1, order], made.w2[1, order]
    assert analysis.output_similarity(seen(made, [[1] * COUNT] * TOKENS)) == pytest.approx(1, abs=1e-6)
    assert analysis.weight_similarity(made) < 0.9


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_weight_similarity_equals_a_loop(activation):
    made = experts(activation=Activation[activation])
    flat = [torch.cat([p[e].flatten() for p in made.parameters()]) for e in range(COUNT)]
    pairs = [cosine(a, b) for a, b in itertools.combinations(flat, 2)]
    assert analysis.weight_similarity(made) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_one_expert_has_no_pairs():
    torch.manual_seed(0)
    made = Experts(WIDTH, MoEConfig(experts=1, expert_width=5), KernelsConfig())
    assert math.isnan(analysis.weight_similarity(made))


def test_load_and_mixing_weights():
    layer = seen(experts(), [[1, 1, 0, 0], [1, 0, 1, 0]], [[0.9, 0.1, 0, 0], [0.5, 0, 0.5, 0]])
    found = analysis.route_statistics([layer])
    assert found.load_max_over_mean == 2  # rows 2, 1, 1, 0: mean 1
    assert found.load_entropy == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(4))
    token_0 = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert found.weight_entropy == pytest.approx((token_0 + math.log(2)) / 2)
    even = analysis.route_statistics([seen(experts(), [[1] * COUNT] * 3)])
    assert (even.load_max_over_mean, even.load_entropy) == (1, pytest.approx(1))
    assert even.weight_entropy == pytest.approx(math.log(COUNT))
    both = analysis.route_statistics([layer, seen(experts(), [[1] * COUNT] * 3)])
    assert both.load_max_over_mean == 1.5  # mean over layers


def test_routing_change_counts_tokens_whose_set_differs():
    made = experts()
    before = [seen(made, [[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]])]
    after = [seen(made, [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1]])]
    assert analysis.routing_change(before, after) == 0.5
    assert analysis.routing_change(before, before) == 0
    assert analysis.routing_change([*before, *before], [*before, *after]) == 0.25  # mean over layers


@pytest.fixture(scope="module")
def corpus():
    ids = np.random.default_rng(0).integers(0, SYMBOLS, 1200).astype(np.uint8)
    meta = {"cuts": [0, 1000, 1100, 1200]}
    return PreparedCorpus(ids, ByteVocab(Tokens.bytes, bytes(range(SYMBOLS))), "0" * 64, [], meta)


def whole_config(router) -> Config:
    config = tiny_config()
    return replace(config, moe=replace(config.moe, router=router), kernels=KernelsConfig(masked_from_k=EXPERTS + 1))


def test_a_hashed_model_is_seen_as_its_tables_say(corpus):
    """The routes that are observed are those of the table, token by token and in the order of the text."""
    config, k = whole_config("hashed"), 2
    train = corpus.split(Split.train)
    tables = build_tables(config.moe, SYMBOLS, train, num_tables=LAYERS, seed=1, cache_dir=None)
    routers = hashed_of(tables, Mesh())
    layers = analysis.observe(RunModel(config, corpus, build_model(config, SYMBOLS), routers), k=k, symbols=50)
    symbols = 50 // SEGMENT * SEGMENT
    inputs = corpus.ids[1099 : 1099 + symbols]  # each symbol's input is the one before it
    assert len(layers) == LAYERS
    for layer, table in zip(layers, tables, strict=True):
        assert layer.hidden_TD.shape == (symbols, config.model.width)
        before = 0  # left of the split's first input nothing is known
        for t, symbol in enumerate(inputs.tolist()):
            row = table.rows_of(torch.tensor([[symbol]]), torch.tensor([[before]])).item()
            chosen = table.order_rE[row, :k].tolist()
            assert layer.chosen_TE[t].nonzero().flatten().tolist() == sorted(chosen)
            weights = torch.softmax(table.logits_rE[row, :k], dim=0)
            assert torch.allclose(layer.weight_TE[t, chosen], weights)
            before = symbol


def test_weights_of_a_gate_are_seen_as_it_makes_them(corpus):
    """A softmax over the token's planned experts, of the gate's products with what the experts read."""
    config, k = whole_config("hashed"), 2
    config = replace(config, moe=replace(config.moe, weights=RouteWeights.live))
    tables = build_tables(config.moe, SYMBOLS, corpus.ids, num_tables=LAYERS, seed=1, cache_dir=None)
    model, routers = build_model(config, SYMBOLS), HashedRouter.of_tables(config.moe, tables)
    layers = analysis.observe(RunModel(config, corpus, model, routers), k=k, symbols=64)
    for block, layer in zip(model.blocks, layers, strict=True):
        weight_ED = block.moe.gate.weight.detach()
        assert layer.chosen_TE.sum(1).unique().tolist() == [k]
        for x_D, chosen_E, weight_E in zip(layer.hidden_TD, layer.chosen_TE, layer.weight_TE, strict=True):
            power = {e: math.exp(weight_ED[e] @ x_D) for e in chosen_E.nonzero().flatten().tolist()}
            want = [power.get(e, 0.0) / sum(power.values()) for e in range(EXPERTS)]
            assert weight_E.tolist() == pytest.approx(want, abs=1e-5)
    with torch.no_grad():
        for block in model.blocks:
            block.moe.gate.weight.mul_(-20)
    other = analysis.observe(RunModel(config, corpus, model, routers), k=k, symbols=64)
    assert analysis.routing_change(layers, other) == 0  # the plan's experts, with other weights
    assert not torch.allclose(layers[0].weight_TE, other[0].weight_TE, atol=0.1)


def test_a_live_router_is_seen_as_it_chooses(corpus):
    config, k = whole_config("frozen"), 2
    model = build_model(config, SYMBOLS)
    layers = analysis.observe(RunModel(config, corpus, model, None), k=k, symbols=64)
    for block, layer in zip(model.blocks, layers, strict=True):
        logits_TE = layer.hidden_TD @ block.moe.router.gate_weight.T
        top_TK = logits_TE.topk(k).indices
        expected_TE = torch.zeros_like(layer.chosen_TE).scatter(1, top_TK, True)
        assert torch.equal(layer.chosen_TE, expected_TE)
        assert torch.allclose(layer.weight_TE.sum(1), torch.ones(len(logits_TE)))
    with torch.no_grad():
        for block in model.blocks:
            block.moe.router.gate_weight.neg_()
    other = analysis.observe(RunModel(config, corpus, model, None), k=k, symbols=64)
    assert analysis.routing_change(layers, other) > 0.9  # the lowest instead of the highest
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_dense_model_shows_no_experts(corpus):
    config = whole_config("dense")
    assert analysis.observe(RunModel(config, corpus, build_model(config, SYMBOLS), None), k=1, symbols=64) == []
