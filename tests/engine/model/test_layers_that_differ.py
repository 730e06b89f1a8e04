"""Layers with a router, a number of experts and an n-gram of their own: the model, its routers, certificate, numbers,
and what is refused. tests/engine/train/test_composition.py trains them with every other option."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foreroute.engine.certificate.counts.exact import certify
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.certificate.memory.sizes import count_parameters
from foreroute.engine.config import (
    Config,
    Corpus,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MoEConfig,
    ScheduleConfig,
    Split,
    TrainConfig,
    to_plain,
)
from foreroute.engine.data.corpus import prepare
from foreroute.engine.errors import UserError
from foreroute.engine.metrics.rank_sums import RankRow, sum_over_ranks
from foreroute.engine.model.build import build_model, build_routers, restore_routers, router_states
from foreroute.engine.model.flops import Arithmetic, forward_flops
from foreroute.engine.model.transformer_xl import Output
from foreroute.engine.moe.layer import MoELayer, update_routers
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.planned_router import GroupTokens, plan_all
from foreroute.engine.testing.planned import planned_counts

EXPERTS, MORE, K, STREAMS, SEGMENT, WIDTH, HIDDEN = 4, 8, 2, 4, 6, 8, 5
OTHERS = {1: {"router": "by_frequency", "experts": MORE}, 2: {"ngram": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    letters = np.random.default_rng(2).random(600) ** 3 * 20 + 97
    (folder / "text.txt").write_bytes(letters.astype(np.uint8).tobytes())
    return folder


def config(folder, by_layer, **moe):
    return Config(
        corpus=CorpusConfig(Corpus.file, str(folder / "text.txt"), cache_dir=str(folder / "cache")),
        data=DataConfig(streams=STREAMS, segment=SEGMENT),
        model=ModelConfig(layers=3, width=WIDTH, heads=2, head_width=4, memory=6),
        moe=MoEConfig(**{"experts": EXPERTS, "ngram": 2, **moe}, expert_width=HIDDEN, rows=512, by_layer=by_layer),
        schedule=ScheduleConfig(k_min=K, k_max=K),
        train=TrainConfig(steps=3),
        eval=EvalConfig(k=[1]),
    )


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one.identity(), other.identity(), strict=True))


def test_each_layers_router_is_that_of_a_run_in_which_all_layers_are_so(folder):
    run = config(folder, OTHERS)
    corpus = prepare(run.corpus)
    found = build_routers(run, corpus)
    for layer, own in enumerate([{}, *OTHERS.values()]):
        alike = build_routers(config(folder, {}, **own), corpus)
        assert type(found[layer]) is type(alike[layer]) and same(found[layer], alike[layer])
        assert not any(same(found[layer], other) for other in alike[:layer] + alike[layer + 1 :])  # control
    again = restore_routers(run, router_states(found), corpus.vocab.size)
    assert all(map(same, found, again))


def test_a_router_without_a_state_of_its_own_is_restored_beside_one_with(folder):
    run = config(folder, {1: {"router": "fresh"}, 2: {"router": "learned"}})
    corpus = prepare(run.corpus)
    found = build_routers(run, corpus)
    assert len(found) == 2 and found[1].state() == {}  # the third layer routes live
    assert all(map(same, found, restore_routers(run, router_states(found), corpus.vocab.size)))


def test_a_planned_layer_behind_a_live_one_has_its_own_plan(folder):
    run = config(folder, {0: {"router": "frozen", "experts": MORE}, 2: {"ngram": 1}})
    corpus = prepare(run.corpus)
    model, routers = build_model(run, corpus.vocab.size), build_routers(run, corpus)
    ids = torch.from_numpy(corpus.split(Split.train)[:24].astype(np.int64)).view(1, STREAMS, SEGMENT)
    plans = plan_all(routers, GroupTokens(ids, torch.zeros(1, STREAMS, 1, dtype=torch.int64)), K)
    out = model(ids[0], ids[0], None, Routing(K, plans))
    assert out.count_LE.shape == (3, MORE) and not out.count_LE[1:, EXPERTS:].any()
    assert out.count_LE[1:, :EXPERTS].tolist() == [plan.count_E.tolist() for plan in plans]
    assert not torch.equal(plans[0].count_E, plans[1].count_E)
    assert out.count_LE[0].sum() == 24 * K and out.count_LE[0, EXPERTS:].any()
    out.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "router" not in name)


def test_a_certificate_counts_what_the_plans_have(folder):
    run = config(folder, OTHERS)
    corpus = prepare(run.corpus)
    ids, layout = corpus.split(Split.train), Layout(run, Placement(2, 2, 2))
    routers = build_routers(run, corpus)
    for counts in replay(layout, ids, routers, range(3)):
        sent, count = planned_counts(layout, ids, routers, counts.step)
        assert (counts.sent_ymgPP == sent).all() and (counts.count_ymgE == count).all()
        want = count.clip(min=0).reshape(3, 1, 1, 2, -1).sum(axis=4)  # by rank
        assert (counts.computed_ymgP == want).all() and (count == -1).sum() == 2 * (MORE - EXPERTS)
        assert counts.experts.size == 2 * EXPERTS + MORE and counts.experts.min() >= 0
        other = build_routers(config(folder, {1: OTHERS[1]}), corpus)
        assert (planned_counts(layout, ids, other, counts.step)[1] != count).any()  # control
    found = certify(layout, ids, routers)
    assert (found.layers, found.experts) == (3, MORE)
    expert = 2 * WIDTH * HIDDEN + HIDDEN + WIDTH
    held = count_parameters(layout, corpus.vocab.size)
    assert held.layer_experts == MORE // 2 * expert
    assert held.inner == tuple(number // 2 * expert for number in (EXPERTS, MORE, EXPERTS))


def test_flops_and_active_parameters_are_those_of_each_layer(folder):
    def flops(by_layer):
        run = config(folder, by_layer)
        return forward_flops(run.model, run.moe, streams=STREAMS, segment=SEGMENT, vocab=7, k=K)

    gate = STREAMS * SEGMENT * 2 * WIDTH
    assert flops({1: {"router": "learned"}}) - flops({}) == gate * EXPERTS
    assert flops({1: {"router": "learned", "experts": MORE}}) - flops({}) == gate * MORE
    assert flops(OTHERS) == flops({})  # k experts of a token each
    expert = 2 * WIDTH * HIDDEN + HIDDEN + WIDTH
    found = Arithmetic(config(folder, OTHERS), 7, 100_000).active_parameters(K)
    assert found == 100_000 - (2 * (EXPERTS - K) + MORE - K) * expert


def test_the_sum_over_ranks_knows_which_experts_there_are():
    count_LE = torch.tensor([[4, 1, 0, 0], [1, 2, 3, 4]])
    output = Output(torch.zeros(()), torch.zeros(()), torch.zeros(1, 1), (), count_LE)
    world = SimpleNamespace(mesh=Mesh(1, 2, 2), sum=lambda values: values)
    total = sum_over_ranks([output, output], world, RankRow(), experts_L=[2, 4])
    found = total.split(total.values.numpy())
    np.testing.assert_array_equal(found.count_LE, [[4, 1, np.nan, np.nan], [1, 2, 3, 4]])  # 2 outputs, groups of 2
    assert found.ranks["rows"].tolist() == [0, 2 * (1 + 3 + 4)]
    even = sum_over_ranks([output], world, RankRow(), experts_L=[4, 4])
    assert even.split(even.values.numpy()).ranks["rows"].tolist() == [0, 3 + 4]


def test_a_live_router_learns_of_its_own_experts_alone(folder):
    run = config(folder, {0: {"router": "sigmoid_bias"}, 1: {"experts": MORE}})
    model = build_model(run, 7)
    count_LE = torch.full((3, MORE), torch.nan, dtype=torch.float64)
    count_LE[0, :EXPERTS] = torch.tensor([3, 1, 0, 0])
    update_routers(model, count_LE)
    assert [layer.num_experts for layer in model.modules() if isinstance(layer, MoELayer)] == [EXPERTS, MORE, EXPERTS]
    (router,) = [layer.router for layer in model.modules() if isinstance(layer, MoELayer) and layer.router is not None]
    signs = [sign for name, value in router.named_buffers() if "bias" in name for sign in value.sign().tolist()]
    assert signs == [-1, 0, 1, 1]


def test_live_routers_of_a_kind_share_from_the_first_of_them(folder):
    of_kind = {"router": "examples.routers.rmoe:RecurrentRouter"}
    model = build_model(config(folder, {1: of_kind, 2: of_kind}, router="learned"), 7)
    first, second = (block.moe.router for block in model.blocks[1:])
    assert second.cell is None and second._cells[0] is first.cell
    x_TD = torch.randn(3, WIDTH)
    assert second(x_TD, K, first(x_TD, K).carried).carried.shape == (3, 256)


def test_the_longest_n_gram_decides_how_many_ids_are_kept(folder):
    assert config(folder, {1: {"ngram": 4}}).context == 3
    assert config(folder, {}).context == 1
    assert config(folder, {layer: {"ngram": 1} for layer in range(3)}).context == 0


def test_numbers_of_layers_may_be_text_and_have_one_form():
    moe = MoEConfig(by_layer={"2": {"ngram": 1}, 10: {"experts": 2}, 2: {"experts": 8}})
    assert moe.by_layer == {"2": {"ngram": 1, "experts": 8}, "10": {"experts": 2}}
    assert list(moe.by_layer) == ["2", "10"] and MoEConfig(**to_plain(moe)) == moe
    assert moe.at_layer(1) is moe and moe.fewest_experts == 2
    assert (moe.at_layer(2).experts, moe.at_layer(2).ngram, moe.at_layer(2).by_layer) == (8, 1, {})
    routed = replace(moe, options={"power": 0.5}, by_layer={0: {"router": "learned"}, 1: {"ngram": 1}})
    assert routed.at_layer(0).options == {} and routed.at_layer(1).options == {"power": 0.5}


@pytest.mark.parametrize(
    ("by_layer", "line"),
    [
        ({-1: {"ngram": 1}}, r"moe\.by_layer\.-1=.*: must be options by the number of a layer from 0"),
        ({0: 3}, r"moe\.by_layer\.0=3: must be options by the number"),
        ({0: {"width": 3}}, r"moe\.by_layer\.0\.width: must be one of router, options, experts, ngram"),
        ({0: {"experts": "8"}}, r"moe\.by_layer\.0\.experts=8: must be a whole number"),
        ({0: {"experts": 0}}, r"moe\.by_layer\.0: moe\.experts=0: must be in 1"),
        ({0: {"router": "dense"}}, r"moe\.by_layer\.0\.router=dense: must have experts"),
        ({0: {"router": "x"}}, r"moe\.by_layer\.0: moe\.router=x: must be one of"),
    ],
)
def test_sections_of_layers_that_are_none_are_refused(by_layer, line):
    with pytest.raises(UserError, match=line):
        MoEConfig(by_layer=by_layer)


@pytest.mark.parametrize("other", [{"router": "dense"}, {"share_table": True}, {"router": "strata", "strata": 4}])
def test_what_all_layers_share_is_refused_with_it(other):
    with pytest.raises(UserError, match=r"moe\.by_layer.*: "):
        MoEConfig(by_layer={0: {"ngram": 1}}, **other)


def test_a_layer_without_experts_or_with_fewer_than_k_is_refused(folder):
    with pytest.raises(UserError, match=r"moe\.by_layer\.1: must be one of the layers that have experts"):
        config(folder, {1: {"ngram": 1}}, layers=[0, 2])
    with pytest.raises(UserError, match=r"schedule\.k_max=2: must be at most moe\.by_layer\.2\.experts=1"):
        config(folder, {2: {"experts": 1}}, layers=[0, 2])
    layout = Layout(config(folder, {2: {"experts": 5}}), Placement(2, 2, 2))
    with pytest.raises(UserError, match=r"moe\.experts=5: must be a multiple of parallel\.expert_ranks=2"):
        layout.check()
    with pytest.raises(UserError, match=r"moe\.router=learned: routes depend on hidden states"):
        Layout(config(folder, {1: {"router": "learned"}})).check()
