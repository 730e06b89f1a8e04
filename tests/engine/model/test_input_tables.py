"""What models are told at their input, against plain loops over ids; and that dense arms have equal parameters for
it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from foreroute.engine.config import (
    Activation,
    Config,
    EvalConfig,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    NgramTablesConfig,
    ScheduleConfig,
)
from foreroute.engine.config.model import feed_forward_width
from foreroute.engine.data.planned_batches import group_batch, plan_batch
from foreroute.engine.data.streams import Batch
from foreroute.engine.errors import UserError
from foreroute.engine.evaluation.generate import Sampling, generate
from foreroute.engine.model.build import RunModel
from foreroute.engine.model.transformer_xl import TransformerXL
from foreroute.engine.ngram_tables.public_keys import qwen_keys
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.routing.ngram_rows import KeyRows
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.plans.row_plan import plan_rows
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.routers import route_of

V, K, MOE = 9, 2, MoEConfig(router="dense", experts=4, expert_width=6, ngram=3, rows=50)
SIZES = ModelConfig(2, 8, heads=2, head_width=4, memory=5, dropout=0.0, init_std=0.3)
TEXT = np.random.default_rng(0).integers(0, V, 400).astype(np.uint8)
IDS, LEFT = (
    torch.from_numpy(TEXT[2:14].astype(np.int64)).view(2, 6),
    torch.from_numpy(TEXT[[0, 1, 6, 7]].astype(np.int64)).view(2, 2),
)


def build(moe=MOE, tables=None, **options):
    torch.manual_seed(0)
    sizes = replace(SIZES, **options)
    return TransformerXL(sizes, moe, KernelsConfig(), V, seed=5, ngram_tables=tables).eval()


def rows(model, ids=IDS, left=LEFT):
    batch = Batch(ids, ids, left, torch.arange(len(ids)), 0, fresh=False)
    return plan_rows(model.table_keys, [batch], CpuGroup())[0].landed_BQH


def hidden_at_input(model, ids, row_BQH):
    """What the first block is given."""
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.logits(ids, None, Routing(K, landed_BQH=row_BQH))
    handle.remove()
    return seen[0]


def grams(ngram):
    """The ids of each place's n-gram, oldest first."""
    text = torch.cat((LEFT[:, 3 - ngram :], IDS), dim=1).tolist()
    return [[tuple(line[q : q + ngram]) for q in range(6)] for line in text]


@pytest.mark.parametrize("ngram,table_rows", [(1, 9), (2, 81), (3, 40)])
def test_ngram_embeddings_equal_a_loop(ngram, table_rows):
    model = build(ngram=ngram, ngram_rows=table_rows)
    left = LEFT[:, 3 - ngram :]
    keys = KeyRows(ngram, V, table_rows, seed=5, index=0)
    weight = model.input_tables.embedding.weight
    got = hidden_at_input(model, IDS, rows(model, left=left))
    for b, line in enumerate(grams(ngram)):
        for q, gram in enumerate(line):
            number = sum(symbol * V**i for i, symbol in enumerate(reversed(gram)))
            row = int(keys.of_keys(np.array([number]))[0])
            if table_rows >= V**ngram:
                assert row == number
            want = (model.embedding.weight[IDS[b, q]] + weight[row]) * 8**0.5
            assert torch.allclose(got[b, q], want, atol=1e-6)
    assert weight.std().item() == pytest.approx(0.3, rel=0.2)
    assert rows(model, left=left)[0].unique().numel() > 5


OLD_ROWS = [[27, 18, 17, 32, 12, 35], [1, 36, 27, 16, 20, 36]]
OLD_ROWS_BESIDE_EXPERTS = [[32, 35, 10, 25, 35, 9], [5, 10, 3, 16, 0, 6]]


def dense(**options):
    return NgramTablesConfig(**{"rows": 40, "orders": [3], "heads": 1, "width": 8, "optimizer": "dense", **options})


@pytest.mark.parametrize("router", ["hashed", "dense"])
def test_one_order_and_head_as_wide_as_the_model_is_what_model_ngram_has(router):
    """The same parameters, values and rows; layers that are dense in each are as wide by an option of their own."""
    moe = replace(MOE, router=router, dense_width=20)
    old, new = build(moe, ngram=3, ngram_rows=40), build(moe, dense())
    assert old.state_dict().keys() == new.state_dict().keys() >= {"input_tables.embedding.weight"}
    assert all(map(torch.equal, old.state_dict().values(), new.state_dict().values()))
    landed = rows(old)
    assert torch.equal(landed[0], rows(new)[0])
    x_BQD = old.embedding(IDS)
    assert torch.equal(*(model.input_tables(x_BQD, landed[0]) for model in (old, new)))
    assert old.num_unread == new.num_unread == 39 * 8


def test_rows_of_model_ngram_stay_where_checkpoints_have_them():
    """As they were when a module of its own held them: V**3 n-grams in 40 rows, by the first hash beside no router."""
    assert rows(build(ngram=3, ngram_rows=40))[0][..., 0].tolist() == OLD_ROWS
    experts = replace(MOE, router="hashed")
    assert rows(build(experts, ngram=3, ngram_rows=40))[0][..., 0].tolist() == OLD_ROWS_BESIDE_EXPERTS


def test_heads_of_several_orders_equal_a_loop():
    model = build(tables=dense(orders=[1, 3], heads=2, rows=20, width=3))
    weight, project = model.input_tables.embedding.weight, model.input_tables.entry.project.weight
    assert weight.shape == (80, 3) and project.shape == (8, 12)
    got = hidden_at_input(model, IDS, rows(model))
    for b in range(2):
        for q in range(6):
            found = []
            for number, (order, head) in enumerate([(1, 0), (1, 1), (3, 0), (3, 1)]):
                key = sum(symbol * V**i for i, symbol in enumerate(reversed(grams(order)[b][q])))
                row = int(KeyRows(order, V, 20, seed=5, index=head).of_keys(np.array([key]))[0])
                found.append(weight[20 * number + row])
            want = (model.embedding.weight[IDS[b, q]] + project @ torch.cat(found)) * 8**0.5
            assert torch.allclose(got[b, q], want, atol=1e-6)


def test_published_keys_find_rows_of_a_dense_table():
    model = build(tables=dense(keys="qwen", rows=11, heads=2, width=4, orders=[2, 3]))
    (keys,) = model.table_keys
    want = qwen_keys(V, 0, orders=[2, 3], rows=11, heads=2, seed=5)
    assert keys.whole and not want.whole
    assert (
        torch.equal(rows(model)[0], want.rows_of(IDS, LEFT)) and len(model.input_tables.embedding.weight) == want.rows
    )


@pytest.mark.parametrize(("at_input", "of_router"), [(1, 3), (2, 3), (3, 2)])
def test_input_and_router_read_n_grams_of_their_own(at_input, of_router):
    """From one left context, which is as long as the longer ones need."""
    moe = replace(MOE, router="hashed", ngram=of_router)
    config = Config(
        model=replace(SIZES, ngram=at_input, ngram_rows=40),
        moe=moe,
        eval=EvalConfig(k=[K]),
        schedule=ScheduleConfig(k_min=K, k_max=K),
    )
    assert config.context == max(at_input, of_router) - 1
    model = build(moe, ngram=at_input, ngram_rows=40)
    routers = [HashedRouter(t) for t in build_tables(moe, V, TEXT, num_tables=2, seed=5, cache_dir=None)]

    def planned(context, routers, keys):
        left = LEFT[:, 2 - context :]
        batch = Batch(IDS, IDS, left, torch.arange(len(IDS)), 0, fresh=False)
        (rows,) = plan_rows(keys, [batch], CpuGroup())
        return plan_batch(group_batch([batch]), K, routers, table_rows=rows).routing

    both = planned(config.context, routers, model.table_keys)
    assert torch.equal(both.landed_BQH[0], planned(at_input - 1, None, model.table_keys).landed_BQH[0])
    for got, want in zip(both.plans, planned(of_router - 1, routers, ()).plans, strict=True):
        assert torch.equal(got.chunks[0].rows.source_N, want.chunks[0].rows.source_N)
        assert torch.equal(got.count_E, want.count_E)
    # with as many rows for the same n-grams the input has collisions of its own, too
    (keys,) = build(moe, ngram=of_router, ngram_rows=moe.rows).table_keys
    assert all(not torch.equal(keys.rows_of(IDS, LEFT)[..., 0], r.table.rows_of(IDS, LEFT)) for r in routers)
    # negative control: another text is routed otherwise
    other = plan_batch(
        group_batch([Batch(IDS.flip(1), IDS, LEFT, torch.arange(2), 0, fresh=False)]), K, routers
    ).routing
    assert not torch.equal(other.plans[0].chunks[0].rows.source_N, both.plans[0].chunks[0].rows.source_N)


def test_signatures_are_the_tables_weights_of_hashed_routing():
    model = build(signatures=True)
    tables = build_tables(MOE, V, TEXT, num_tables=2, seed=5, cache_dir=None)
    model.input_tables.fill([HashedRouter(table).row_sets(K).dense_weights(4) for table in tables])
    got = hidden_at_input(model, IDS, rows(model))
    features = torch.zeros(12, 2, 4)
    for layer, table in enumerate(tables):
        route = route_of(HashedRouter(table), IDS, LEFT, K)
        for token in range(12):
            for expert, weight in zip(route.expert_TK[token].tolist(), route.weight_TK[token].tolist(), strict=True):
                features[token, layer, expert] = weight
    assert torch.allclose(features.sum(-1), torch.ones(12, 2))
    linear = model.input_tables.map
    want = features.flatten(1) @ linear.weight.T + linear.bias
    want = (model.embedding(IDS).flatten(0, 1) + want) * 8**0.5
    assert torch.allclose(got.flatten(0, 1), want, atol=1e-6)
    # negative control: rows of other keys are other features
    other = hidden_at_input(model, IDS, rows(model, left=(LEFT + 1) % V))
    assert not torch.allclose(other[:, 0], got[:, 0], atol=1e-3)
    assert torch.allclose(other[:, 2:], got[:, 2:])  # trigrams end inside the segment there


@pytest.mark.parametrize("control", [{"ngram": 3, "ngram_rows": 40}, {"signatures": True}])
def test_generation_reads_the_same_rows_as_a_whole_segment(control):
    model = build(**control)
    if "signatures" in control:
        tables = build_tables(MOE, V, TEXT, num_tables=2, seed=5, cache_dir=None)
        model.input_tables.fill([HashedRouter(table).row_sets(K).dense_weights(4) for table in tables])
    config = Config(model=replace(SIZES, **control), moe=MOE, eval=EvalConfig(k=[K]))
    greedy = Sampling(0, 1.0, torch.Generator())
    text = [3, 1, 4]
    text += generate(RunModel(config, None, model, None), text, k=K, length=6, sampling=greedy)
    ids = torch.tensor([text[:-1]])
    landed = rows(model, ids, torch.zeros(1, 2, dtype=torch.int64))
    logits_BQV = model.logits(ids, None, Routing(K, landed_BQH=landed)).logits_BQV
    assert logits_BQV[0, 2:].argmax(-1).tolist() == text[3:]


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("options", [{"ngram": 3, "ngram_rows": 900}, {"signatures": True}])
def test_dense_models_with_input_tables_have_equal_parameters(activation, options):
    moe = replace(MOE, experts=8, expert_width=64, activation=activation)
    counts = []
    for control in ({}, options):
        model = build(moe, width=32, **control)
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts[1] == pytest.approx(counts[0], rel=0.005)
    assert feed_forward_width(replace(SIZES, width=32, **options), moe, 0) < 8 * 64


def test_the_first_layers_have_experts_and_the_others_are_plain():
    moe = MoEConfig(experts=4, expert_width=6, layers=1, plain_width=7)
    experts, plain = build(moe).blocks
    assert experts.has_experts and not plain.has_experts
    assert plain.feed_forward.w1.weight.shape == (7, 8)
    wide, plain = build(replace(moe, router="dense")).blocks
    assert wide.feed_forward.w1.weight.shape == (24, 8)
    assert plain.feed_forward.w1.weight.shape == (7, 8)
    assert feed_forward_width(SIZES, replace(moe, router="dense", dense_width=5), 0) == 5


BAD = {
    "two dense tables": (
        {"model": ModelConfig(ngram=2), "ngram_tables": dense()},
        "model.ngram=2 with ngram_tables.optimizer=dense: take one of them",
    ),
    "signatures and a dense table": (
        {"model": ModelConfig(signatures=True), "moe": MOE, "ngram_tables": dense()},
        "model.signatures=true with ngram_tables.optimizer=dense",
    ),
    "hashed has signatures": ({"model": ModelConfig(signatures=True)}, "model.signatures=True: needs moe.router=dense"),
    "layers": ({"moe": MoEConfig(layers=5)}, "moe.layers=5: must be at most model.layers=4"),
    "signatures of more experts than there are": (
        {"model": ModelConfig(signatures=True), "moe": MOE, "schedule": ScheduleConfig(k_min=1, k_max=5)},
        "schedule.k_max=5: must be at most moe.experts=4",
    ),
    "no width left": (
        {"model": ModelConfig(ngram=2, ngram_rows=99999), "moe": replace(MOE, experts=2)},
        "model.ngram_rows=99999: no",
    ),
}


@pytest.mark.parametrize("sections,message", BAD.values(), ids=BAD.keys())
def test_what_does_not_go_together_is_refused(sections, message):
    with pytest.raises(UserError, match=message):
        Config(**{"schedule": ScheduleConfig(k_max=1), "eval": EvalConfig(k=[1]), **sections})


def test_sections_refuse_alone():
    with pytest.raises(UserError, match=r"model.ngram=5: must be in 0 \.\. 4"):
        ModelConfig(ngram=5)
    with pytest.raises(UserError, match="take one of them"):
        ModelConfig(ngram=2, signatures=True)
    for options in ({"layers": [1]}, {"layers": [1], "entry": "gate"}, {"place": "host"}):
        with pytest.raises(UserError, match=r"ngram_tables\.(layers|place)=.*: needs ngram_tables.optimizer=sparse"):
            dense(**options)
