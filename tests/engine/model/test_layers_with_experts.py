"""Which layers have experts: the model, its plans, its certificate, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from foreroute.engine.certificate.counts.exact import certify
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.config import Config, DataConfig, EvalConfig, ModelConfig, MoEConfig, ScheduleConfig, TrainConfig
from foreroute.engine.data.streams import Streams
from foreroute.engine.errors import UserError
from foreroute.engine.model.build import build_model
from foreroute.engine.model.flops import forward_flops
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import GroupTokens, RouterInputs, plan_all

SYMBOLS, EXPERTS, K, STREAMS, SEGMENT = 7, 4, 2, 4, 6
TEXT = np.random.default_rng(0).integers(0, SYMBOLS, 400).astype(np.uint8)


def config(layers, **moe):
    return Config(
        data=DataConfig(streams=STREAMS, segment=SEGMENT),
        model=ModelConfig(layers=3, width=8, heads=2, head_width=4, memory=6),
        moe=MoEConfig(experts=EXPERTS, expert_width=5, ngram=2, rows=49, layers=layers, plain_width=9, **moe),
        schedule=ScheduleConfig(k_min=K, k_max=K),
        train=TrainConfig(steps=3),
        eval=EvalConfig(k=[1]),
    )


def routers(run):
    return HashedRouter.build(run.moe, RouterInputs(SYMBOLS, 1, run.num_tables, TEXT))


@pytest.mark.parametrize(
    ("layers", "with_experts"), [(None, [0, 1, 2]), (1, [0]), ("2", [0, 1]), ([2], [2]), (["0", "2"], [0, 2])]
)
def test_the_layers_that_are_named_have_experts_and_the_others_are_plain(layers, with_experts):
    run = config(layers)
    model = build_model(run, SYMBOLS)
    assert [number for number, block in enumerate(model.blocks) if block.has_experts] == with_experts
    assert [block.moe.layer for block in model.blocks if block.has_experts] == list(range(len(with_experts)))
    plain = [block for block in model.blocks if not block.has_experts]
    assert all(block.feed_forward.w1.out_features == 9 for block in plain)
    assert run.num_tables == run.expert_layers == len(with_experts)
    dense = build_model(replace(run, moe=replace(run.moe, router="dense")), SYMBOLS)
    widths = [block.feed_forward.w1.out_features for block in dense.blocks]
    assert widths == [20 if number in with_experts else 9 for number in range(3)]


def test_each_expert_layer_has_its_own_plan():
    run = config([0, 2])
    model = build_model(run, SYMBOLS)
    ids = torch.from_numpy(TEXT[:24].astype(np.int64)).view(1, STREAMS, SEGMENT)
    left = torch.zeros(1, STREAMS, 1, dtype=torch.int64)
    plans = plan_all(routers(run), GroupTokens(ids, left), K)
    assert len(plans) == 2 and not torch.equal(plans[0].count_E, plans[1].count_E)
    out = model(ids[0], ids[0], None, Routing(K, plans))
    assert torch.equal(out.count_LE, torch.stack([plan.count_E for plan in plans]))
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_certificate_counts_the_expert_layers_alone():
    run = config([1, 2])
    tables = routers(run)
    layout, streams = Layout(run, Placement(2, 2, 2)), Streams(TEXT, STREAMS, SEGMENT, run.context)
    for counts in replay(layout, TEXT, tables, range(3)):
        assert counts.count_ymgE.shape == (2, 1, 1, EXPERTS)
        batch = streams.batch(counts.step, range(STREAMS))
        for number, router in enumerate(tables):
            want, sent = [0] * EXPERTS, [[0, 0], [0, 0]]
            rows = router.table.rows_of(batch.ids_BQ, batch.left_BC).tolist()
            for stream, row_Q in enumerate(rows):
                for row in row_Q:
                    experts = router.table.order_rE[row, :K].tolist()
                    for expert in experts:
                        want[expert] += 1
                    for home in {expert // 2 for expert in experts}:
                        sent[stream // 2][home] += 1
            assert counts.count_ymgE[number, 0, 0].tolist() == want
            assert counts.sent_ymgPP[number, 0, 0].tolist() == sent
    found = certify(layout, TEXT, tables)
    assert found.layers == 2
    everywhere = config(None)
    whole = certify(Layout(everywhere, Placement(2, 2, 2)), TEXT, routers(everywhere))
    assert whole.layers == 3 and whole.whole.bytes["tokens"].total > found.whole.bytes["tokens"].total  # control


def test_flops_are_those_of_the_layers_kinds():
    def flops(layers):
        run = config(layers)
        return forward_flops(run.model, run.moe, streams=STREAMS, segment=SEGMENT, vocab=SYMBOLS, k=K)

    tokens, expert, plain = STREAMS * SEGMENT, K * 5, 9
    one_more = tokens * 2 * 2 * 8 * (expert - plain)  # two products, of width 8, two operations each
    assert flops([2]) == flops([0]) == flops(1)
    assert flops([0, 2]) - flops([2]) == flops(None) - flops([0, 1]) == one_more


@pytest.mark.parametrize("layers", [0, [], [1, 1], [2, 1], [-1], "x", ["x"], True, 1.5])
def test_numbers_of_layers_that_are_none_are_refused(layers):
    with pytest.raises(UserError, match=r"moe\.layers=.*: must be how many of the first layers have experts"):
        MoEConfig(layers=layers)


def test_a_layer_that_the_model_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"moe.layers=\[1, 3\]: must be below model.layers=3"):
        config([1, 3])
    with pytest.raises(UserError, match=r"moe.layers=4: must be at most model.layers=3"):
        config(4)
