"""A chain of expert layers in a layer: against a loop over tokens and strata, and its depths against plain counts."""

import functools
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    ScheduleConfig,
    TrainConfig,
)
from foreroute.engine.data.streams import Streams
from foreroute.engine.errors import UserError
from foreroute.engine.model.attention import SharedAttention, encode_distances
from foreroute.engine.model.block import Block
from foreroute.engine.model.build import build_model
from foreroute.engine.model.flops import forward_flops
from foreroute.engine.routing.methods import method_of
from foreroute.engine.routing.plan import Routing, layer_seeds
from foreroute.engine.routing.planned.strata import StrataRouter
from foreroute.engine.routing.planned_router import GroupTokens, RouterInputs, plan_all
from tests.references.strata import chain

pytestmark = pytest.mark.method
STRATA, EXPERTS, SYMBOLS, WIDTH, HIDDEN, STREAMS, SEGMENT = 3, 4, 24, 8, 5, 2, 10
TEXT = np.random.default_rng(2).triangular(0, 0, SYMBOLS, 12_000).astype(np.uint8)
SIZES = ModelConfig(layers=2, width=WIDTH, heads=2, head_width=4, memory=10, dropout=0.0, pre_norm=True)


def moe(strata=STRATA, **more):
    options = {"experts": EXPERTS, "expert_width": HIDDEN, "ngram": 2, "rows": SYMBOLS**2} | more
    return MoEConfig(router="strata", strata=strata, **options)


@functools.cache
def routers(layers=1, **options):
    return StrataRouter.build(moe(**options), RouterInputs(SYMBOLS, 3, layers * STRATA, TEXT))


def run_config(k, **more):
    options = {
        "data": DataConfig(streams=STREAMS, segment=SEGMENT),
        "model": SIZES,
        "moe": moe(),
        "schedule": ScheduleConfig(k_min=k, k_max=k),
        "train": TrainConfig(steps=3),
        "eval": EvalConfig(k=[1]),
    }
    return Config(**(options | more))


def ids_of(step=0):
    ids = torch.from_numpy(TEXT[100 * step :][: STREAMS * SEGMENT].astype(np.int64)).view(1, STREAMS, SEGMENT)
    return ids, torch.zeros(1, STREAMS, 1, dtype=torch.int64)


def path_of(chain_of_routers, row, k):
    """The experts of a row, one for each stratum that it passes through, in plain Python."""
    tables = [router.table for router in chain_of_routers]
    return [int(table.order_rE[row, 0]) for table in tables if int(table.first_rE[row, 0]) <= k]


def block_of(strata=STRATA, **options):
    torch.manual_seed(0)
    block = Block(SIZES, moe(strata, **options), KernelsConfig(), 0).double()
    for index, parameter in enumerate(block.parameters()):
        generator = torch.Generator().manual_seed(index)
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return block


def inputs_of(block):
    """A block's input, an empty memory and what attention shares; and the hidden states behind attention."""
    x = torch.randn(STREAMS, SEGMENT, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    u, v = torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    shared = SharedAttention(encode_distances(SEGMENT, WIDTH, clamp_len=0, like=x), u, v, None, None)
    memory = x.new_empty(STREAMS, 0, WIDTH)
    return (x, memory, shared), block._attend(x, memory, shared)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_block_is_a_loop_over_tokens_and_strata(k):
    block, found, (ids, left) = block_of(), routers(), ids_of()
    inputs, h = inputs_of(block)
    plans = plan_all(found, GroupTokens(ids, left), k)
    rows = found[0].table.rows_of(ids[0], left[0]).flatten().tolist()
    path = [path_of(found, row, k) for row in rows]
    assert k != 2 or len({len(experts) for experts in path}) == STRATA
    out = block(*inputs, Routing(k, plans))
    layers = [block.moe, *block.strata]
    norms = [block.feed_forward_norm, *block.strata_norms]
    strata = []
    for norm, layer in zip(norms, layers, strict=True):
        e = layer.experts
        strata.append([p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias, e.w1, e.b1, e.w2, e.b2)])
    want = chain(h.detach().flatten(0, 1), strata, path)
    torch.testing.assert_close(out.y_BQD.flatten(0, 1), want, rtol=0, atol=1e-10)
    counts = [Counter(experts[s] for experts in path if len(experts) > s) for s in range(STRATA)]
    assert out.count_SE.tolist() == [[count[e] for e in range(EXPERTS)] for count in counts]
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (out.y_BQD.flatten(0, 1) * cotangent).sum().backward()
    (want * cotangent).sum().backward()
    for norm, layer, theirs in zip(norms, layers, strata, strict=True):
        e = layer.experts
        for mine, other in zip((norm.weight, norm.bias, e.w1, e.b1, e.w2, e.b2), theirs, strict=True):
            other_grad = torch.zeros_like(other) if other.grad is None else other.grad
            torch.testing.assert_close(mine.grad, other_grad, rtol=1e-9, atol=1e-9)


def test_of_depth_1_for_all_it_is_one_expert_layer():
    deep, plain, (ids, left) = block_of(), block_of(strata=1), ids_of()
    plain.load_state_dict({name: value for name, value in deep.state_dict().items() if "strata" not in name})
    inputs, _ = inputs_of(deep)
    plans = plan_all(routers(), GroupTokens(ids, left), 1)
    assert plans[1].count_E.sum() == plans[2].count_E.sum() == 0
    got, want = deep(*inputs, Routing(1, plans)), plain(*inputs, Routing(1, plans[:1]))
    assert torch.equal(got.y_BQD, want.y_BQD)
    more = deep(*inputs, Routing(2, plan_all(routers(), GroupTokens(ids, left), 2)))
    assert not torch.allclose(more.y_BQD, want.y_BQD)  # control


def uses():
    keys = Counter(a * SYMBOLS + b for a, b in pairwise([0, *TEXT.tolist()]))
    return np.array([keys[row] for row in range(SYMBOLS**2)])


@pytest.mark.parametrize("deep", ["rare", "frequent"])
def test_depths_are_k_on_average_nested_and_evenly_loaded(deep):
    found = StrataRouter.build(moe(options={"deep": deep}), RouterInputs(SYMBOLS, 3, STRATA, TEXT))
    use_r, before = uses(), np.zeros(SYMBOLS**2, int)
    for k in range(1, STRATA + 1):
        paths = [path_of(found, row, k) for row in range(SYMBOLS**2)]
        depth_r = np.array([len(path) for path in paths])
        assert (depth_r >= before).all() and (depth_r >= 1).all()
        assert abs(depth_r @ use_r / use_r.sum() - k) <= use_r.max() / use_r.sum() / 2
        before = depth_r
        for s in range(STRATA):
            load_E = np.bincount(
                [path[s] for path in paths if len(path) > s],
                [use for path, use in zip(paths, use_r, strict=True) if len(path) > s],
                EXPERTS,
            )
            assert load_E.max() <= 1.05 * load_E.mean()
        if k == 2:
            half = np.argsort(-use_r, kind="stable")[: np.count_nonzero(use_r) // 4]
            frequent, rare = depth_r[half].mean(), np.delete(depth_r, half)[np.delete(use_r, half) > 0].mean()
            assert (rare > frequent) == (deep == "rare")


GROWING = {"strata_experts": [2, 4, 6]}


def test_strata_that_grow_have_experts_of_their_own():
    """A block is a loop over tokens and strata, and each stratum is balanced over its own experts."""
    run = moe(**GROWING)
    found = StrataRouter.build(run, RouterInputs(SYMBOLS, 3, STRATA, TEXT))
    block, (ids, left), k = block_of(**GROWING), ids_of(), 2
    assert [router.experts for router in found] == [len(s.experts.w1) for s in (block.moe, *block.strata)] == [2, 4, 6]
    inputs, h = inputs_of(block)
    out = block(*inputs, Routing(k, plan_all(found, GroupTokens(ids, left), k)))
    path = [path_of(found, row, k) for row in found[0].table.rows_of(ids[0], left[0]).flatten().tolist()]
    norms, layers = [block.feed_forward_norm, *block.strata_norms], [block.moe, *block.strata]
    strata = [
        (norm.weight, norm.bias, e.w1, e.b1, e.w2, e.b2)
        for norm, e in zip(norms, [layer.experts for layer in layers], strict=True)
    ]
    torch.testing.assert_close(out.y_BQD.flatten(0, 1), chain(h.flatten(0, 1), strata, path), rtol=0, atol=1e-10)
    counts = [Counter(experts[s] for experts in path if len(experts) > s) for s in range(STRATA)]
    assert out.count_SE.tolist() == [[count[e] for e in range(6)] for count in counts]
    row_r = found[0].table.rows_of(torch.from_numpy(TEXT[None].astype(np.int64)), torch.zeros(1, 1, dtype=torch.int64))
    for router, experts in zip(found, (2, 4, 6), strict=True):
        reach = (router.table.first_rE[:, 0] <= k)[row_r]
        load_E = np.bincount(router.table.order_rE[:, 0][row_r][reach].numpy(), minlength=experts)
        assert len(load_E) == experts and load_E.max() <= 1.05 * load_E.mean()
    again = StrataRouter.restore(run, RouterInputs(SYMBOLS, 3, STRATA), [router.state() for router in found])
    assert [router.experts for router in again] == [2, 4, 6]


@pytest.mark.parametrize("experts", [[2, 4], [2, 0, 4], [2, "4", 4]])
def test_numbers_of_experts_that_do_not_fit_the_strata_are_refused(experts):
    with pytest.raises(UserError, match=r"moe\.strata_experts=.*: must be whole numbers in 1 \.\. 512, one for each"):
        moe(strata_experts=experts)
    with pytest.raises(UserError, match=r"moe\.strata_experts=\[2\]: .* moe\.strata=1, which must be at least 2"):
        MoEConfig(strata_experts=[2])


@pytest.mark.parametrize("share_table", [False, True])
def test_a_certificate_counts_each_stratum(share_table):
    k, tables = 2, routers(1 if share_table else 2)
    run = run_config(k, data=DataConfig(streams=4, segment=SEGMENT), moe=moe(share_table=share_table))
    assert run.num_tables == len(tables)
    streams = Streams(TEXT, 4, SEGMENT, run.context)
    for counts in replay(Layout(run, Placement(2, 2, 2)), TEXT, tables, range(3)):
        assert counts.count_ymgE.shape[0] == 2 * STRATA == run.expert_layers
        batch = streams.batch(counts.step, range(4))
        for layer in range(2):
            found = tables[:STRATA] if share_table else tables[layer * STRATA :][:STRATA]
            want, sent = np.zeros((STRATA, EXPERTS), int), np.zeros((STRATA, 2, 2), int)
            for stream, row_Q in enumerate(found[0].table.rows_of(batch.ids_BQ, batch.left_BC).tolist()):
                for row in row_Q:
                    for s, expert in enumerate(path_of(found, row, k)):
                        want[s, expert] += 1
                        sent[s, stream // 2, expert // 2] += 1
            part = slice(layer * STRATA, (layer + 1) * STRATA)
            assert counts.count_ymgE[part, 0, 0].tolist() == want.tolist()
            assert counts.sent_ymgPP[part, 0, 0].tolist() == sent.tolist()


def test_the_model_trains_every_stratum_and_flops_are_those_of_k_experts():
    run = run_config(2, model=replace(SIZES, dropout=0.1))
    model = build_model(run, SYMBOLS)
    ids, left = ids_of()
    plans, seeds = plan_all(routers(2), GroupTokens(ids, left), 2), layer_seeds(1, run.expert_layers)
    out = model(ids[0], ids[0], None, Routing(2, plans, dropout_seed=seeds))
    assert out.count_LE.shape == (2 * STRATA, EXPERTS)
    assert out.count_LE.view(2, STRATA, EXPERTS).sum(dim=(1, 2)).tolist() == pytest.approx([40, 40], abs=12)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    def flops(k):
        return forward_flops(SIZES, run.moe, streams=STREAMS, segment=SEGMENT, vocab=SYMBOLS, k=k)

    assert flops(2) - flops(1) == 2 * STREAMS * SEGMENT * 2 * 2 * WIDTH * HIDDEN


def test_state_is_restored():
    found = routers(2)
    states = [router.state() for router in found]
    save({f"{number}/{name}": value for number, state in enumerate(states) for name, value in state.items()})
    again = StrataRouter.restore(moe(), RouterInputs(SYMBOLS, 3, 2 * STRATA), states)
    for mine, theirs in zip(found, again, strict=True):
        for one, other in zip(mine.identity(), theirs.identity(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_what_is_refused():
    with pytest.raises(UserError, match=r"moe.strata=2: must be 1 with moe.router=hashed"):
        method_of(MoEConfig(strata=2))
    with pytest.raises(UserError, match=r"schedule.k_max=4: must be at most moe.strata=3"):
        run_config(4)
    with pytest.raises(UserError, match=r"moe.strata=3: needs model.pre_norm=true"):
        run_config(2, model=ModelConfig(layers=2))
