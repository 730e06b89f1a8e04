"""Experts of unequal width as slices: against wide experts one by one, and their tables against plain loops."""

import functools
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import distributed as dist

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
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from foreroute.engine.data.streams import Streams
from foreroute.engine.errors import UserError
from foreroute.engine.moe.exchange import build_exchange
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.planned.sized import SizedRouter
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.routers import plan_of, route_of
from tests.references.sized import WideExperts

pytestmark = pytest.mark.method
SIZES, SYMBOLS, WIDTH, HIDDEN, TOKENS, STEPS = [1, 1, 2, 4], 9, 6, 5, 24, 5
SLICES = sum(SIZES)
TEXT = (np.random.default_rng(0).zipf(1.5, 6000) % SYMBOLS).astype(np.uint8)


def config(small_first=False, least=0, **more):
    options = {"sizes": SIZES, "small_first": small_first, "least": least}
    more = {"experts": SLICES, "expert_width": HIDDEN, "ngram": 2, "rows": 128} | more
    return MoEConfig(router="sized", options=options, **more)


@functools.cache
def routers(number=1, **options):
    return SizedRouter.build(config(**options), RouterInputs(SYMBOLS, 3, number, TEXT))


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts_of(router, row, k):
    """The experts of a row and their weights by the rule, in plain Python."""
    order = router.table.order_rE[row].tolist()
    chosen = [g for g, first in zip(order, router.table.first_rE[row].tolist(), strict=True) if first <= k]
    if router.table.logits_rE is None:
        return [(g, float(np.float32(1) / np.float32(len(chosen)))) for g in chosen]
    weights = torch.softmax(router.table.logits_rE[row, : len(chosen)].double(), dim=0).tolist()
    return list(zip(chosen, weights, strict=True))


def tokens(ranks=1, seed=5):
    """Ids of a group and what is left of them."""
    ids = torch.from_numpy(TEXT[100 + 100 * seed :][: ranks * TOKENS].astype(np.int64)).view(ranks, 1, TOKENS)
    return ids, torch.zeros(ranks, 1, 1, dtype=torch.int64)


def sets_of(router, ids, left, k):
    rows = torch.cat([router.table.rows_of(*pair).flatten() for pair in zip(ids, left, strict=True)])
    return [experts_of(router, row, k) for row in rows.tolist()]


def layer_of(**options):
    layer = MoELayer(WIDTH, config(**options), KernelsConfig(), 0).double()
    for index, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=8 + index)
    return layer


def optimizer(named, kind):
    if kind == "adam":
        return torch.optim.Adam([p for _, p in named], 1e-2)
    parts = [[p for name, p in named if name.rpartition(".")[2].startswith("b") is bias] for bias in (False, True)]
    groups = [{"params": part, "weight_decay": 0.0 if bias else 0.1} for bias, part in enumerate(parts)]
    return torch.optim.AdamW(groups, 1e-2)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("kind", ["adam", "adamw, biases excluded by name"])
def test_slices_are_one_wide_expert_forward_in_all_gradients_and_after_steps_of_adam(kind, activation):
    """Experts of 1, 1, 2 and 4 slices; weights 1 / number of experts, so that fp32 weights are the loop's."""
    options = {"weights": "uniform", "activation": activation}
    (router,), layer, k = routers(**options), layer_of(**options), 5
    stacked = {name: p.detach().clone() for name, p in layer.experts.named_parameters()}
    wide = WideExperts(SIZES, stacked)
    layer.experts.b2.data *= layer.experts.first_L1
    named = list(layer.named_parameters()), wide.named()
    rules = [optimizer(group, kind) for group in named]
    for step in range(STEPS):
        ids, left = tokens(seed=step)
        x, target = normal(TOKENS, WIDTH, seed=50 + step), normal(TOKENS, WIDTH, seed=70 + step)
        sets = sets_of(router, ids, left, k)
        assert len({len(found) for found in sets}) > 1
        x_own, x_wide = x.clone().requires_grad_(), x.clone().requires_grad_()
        y_own = layer(x_own, Routing(k, (plan_of(router, ids, left, k),))).y_TD
        y_wide = wide(x_wide, sets)
        for rule, y in zip(rules, (y_own, y_wide), strict=True):
            rule.zero_grad()
            (0.5 * (y - target).square().mean()).backward()
        torch.testing.assert_close(y_own, y_wide, rtol=0, atol=1e-12)
        torch.testing.assert_close(x_own.grad, x_wide.grad, rtol=0, atol=1e-12)
        for name, p in layer.experts.named_parameters():
            torch.testing.assert_close(p.grad, wide.as_slices(name, grad=True), rtol=0, atol=1e-12)
        for rule in rules:
            rule.step()
    for name, p in layer.experts.named_parameters():
        torch.testing.assert_close(p.detach(), wide.as_slices(name), rtol=0, atol=1e-12)
        assert not torch.allclose(p.detach(), stacked[name], atol=1e-3)


def test_a_bias_in_each_slice_would_not_be_the_wide_experts():
    """Negative control: without the mask, a group's biases move several times as far."""
    options = {"weights": "uniform"}
    (router,), layer = routers(**options), layer_of(**options)
    wide = WideExperts(SIZES, {name: p.detach() for name, p in layer.experts.named_parameters()})
    layer.experts.first_L1 = None
    ids, left = tokens()
    x = normal(TOKENS, WIDTH, seed=1)
    y = layer(x, Routing(5, (plan_of(router, ids, left, 5),))).y_TD
    assert (y - wide(x, sets_of(router, ids, left, 5))).abs().max() > 0.1


@pytest.mark.parametrize("weights", ["table", "uniform", "sum"])
def test_slices_have_the_weight_of_their_expert_and_a_plan_has_its_slices_rows(weights):
    (router,) = routers(weights=weights)
    for k in range(1, SLICES + 1):
        ids, left = tokens(seed=k)
        sets = sets_of(router, ids, left, k)
        want = torch.zeros(TOKENS, SLICES)
        first = np.cumsum([0, *SIZES])
        for token, found in enumerate(sets):
            for g, weight in found:
                want[token, first[g] : first[g] + SIZES[g]] = 1.0 if weights == "sum" else weight
        route = route_of(router, ids[0], left[0], k)
        got = torch.zeros(TOKENS, SLICES).scatter_add(1, route.expert_TK, route.weight_TK * route.used_TK)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        plan = plan_of(router, ids, left, k)
        assert plan.count_E.tolist() == (want > 0).sum(dim=0).tolist()
        assert plan.count_E.sum() == sum(SIZES[g] for found in sets for g, _ in found)


def even_text(symbols=24):
    """A text without very frequent bigrams."""
    return np.random.default_rng(2).triangular(0, 0, symbols, 12_000).astype(np.uint8)


def even_router(**options):
    return SizedRouter.build(config(rows=1024, experts=2 * SLICES, **options), RouterInputs(24, 3, 1, even_text()))[0]


def uses(router):
    """How often the text uses each row, by a loop."""
    stream = [0, *even_text().tolist()]
    keys = Counter(a * 24 + b for a, b in itertools.pairwise(stream))
    return np.array([keys[row] for row in range(len(router.table.first_rE))])


@pytest.mark.parametrize(("small_first", "busiest"), [(False, 1.03), (True, 1.25)])
def test_the_mean_over_the_text_is_k_slices_nested_in_k_and_evenly_loaded(small_first, busiest):
    router = even_router(small_first=small_first)
    use_r = uses(router)
    assert use_r.sum() == len(even_text())
    before, sizes = np.zeros(len(use_r), int), np.array(2 * SIZES)
    for k in range(1, 2 * SLICES + 1):
        sets = [[g for g, _ in experts_of(router, row, k)] for row in range(len(use_r))]
        size_r = np.array([sizes[np.array(found, int)].sum() for found in sets])
        assert (size_r >= before).all()  # a prefix of the same order: nested
        before = size_r
        heaviest = sizes.max() * use_r.max() / use_r.sum()
        assert abs(size_r @ use_r / use_r.sum() - k) <= heaviest / 2 + 1e-12
        if 2 <= k <= 12:  # fewer leave rows without experts, more leave no choice
            load_G = sum(
                np.bincount(np.array(found, int), minlength=8) * use for found, use in zip(sets, use_r, strict=True)
            )
            assert load_G.max() < busiest * (load_G @ sizes / sizes.sum())
    assert (before == sizes.sum()).all()


def test_frequent_rows_have_small_first_choices_if_asked():
    means = []
    for small_first in (False, True):
        router = even_router(small_first=small_first)
        use_r, first = uses(router), router.table.order_rE[:, 0].numpy()
        ordered = np.argsort(-use_r, kind="stable")
        frequent = ordered[np.cumsum(use_r[ordered]) < 0.4 * use_r.sum()]
        means.append(np.array(2 * SIZES)[first[frequent]] @ use_r[frequent] / use_r[frequent].sum())
        load_G = np.bincount(first, use_r, minlength=8)
        assert load_G.max() < 1.05 * load_G.mean()
    assert means[1] == 1.0 and means[0] > 1.5


def test_each_row_has_an_expert_if_asked():
    for least in (0, 1):
        router = even_router(least=least)
        count_r, use_r = router.row_sets(1).count_r.numpy(), uses(router)
        assert ((count_r > 0).all(), count_r @ use_r / use_r.sum() > 1.5) == (bool(least), bool(least))
        assert router.row_sets(6).count_r.numpy() @ use_r / use_r.sum() == pytest.approx(6, abs=0.02)


def on_rank(rank, ranks, chunks):
    """Outputs and gradients of a rank, of its tokens and experts."""
    options, k = {"weights": "uniform", "activation": "swiglu"}, 5
    layer = layer_of(**options)
    local = range(rank * SLICES // ranks, (rank + 1) * SLICES // ranks)
    router = SizedRouter.build(config(**options), RouterInputs(SYMBOLS, 3, 1, TEXT))[0].place(Mesh(rank, ranks, ranks))
    if ranks > 1:
        layer.keep_experts(local)
        layer.connect(build_exchange(ExpertGroupComm(dist.group.WORLD), ParallelConfig(expert_ranks=ranks)))
    ids, left = tokens(2)
    here = slice(rank * TOKENS, (rank + 1) * TOKENS) if ranks > 1 else slice(None)
    if ranks == 1:
        ids, left = ids.view(1, 2, TOKENS), left.view(1, 2, 1)
    x = normal(2 * TOKENS, WIDTH, seed=6)[here].requires_grad_()
    y = layer(x, Routing(k, (plan_of(router, ids, left, k, chunks=chunks),))).y_TD
    (y * normal(2 * TOKENS, WIDTH, seed=7)[here]).sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in layer.experts.named_parameters()}


@pytest.mark.dist
@pytest.mark.parametrize("chunks", [1, 3])
def test_two_ranks_are_one(chunks):
    (want,), got = run_ranks(on_one_rank, 1), run_ranks(on_rank, 2, 2, chunks)
    torch.testing.assert_close(torch.cat([part[0] for part in got]), want[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([part[1] for part in got]), want[1], rtol=0, atol=1e-12)
    for name, grad in want[2].items():
        torch.testing.assert_close(torch.cat([part[2][name] for part in got]), grad, rtol=0, atol=1e-12)


def on_one_rank(rank):
    return on_rank(rank, 1, 1)


def test_a_certificate_counts_the_slices_of_each_token():
    found, streams, segment, k = routers(number=2), 4, 12, 3
    run = Config(
        data=DataConfig(streams=streams, segment=segment),
        model=ModelConfig(layers=2, width=8),
        moe=config(),
        schedule=ScheduleConfig(k_min=k, k_max=k),
        train=TrainConfig(steps=3),
        eval=EvalConfig(k=[k]),
    )
    text = Streams(TEXT, streams, segment, run.context)
    for counts in replay(Layout(run, Placement(2, 2, 2)), TEXT, found, range(3)):
        for number, router in enumerate(found):
            batch = text.batch(counts.step, range(streams))
            want, sent = np.zeros(SLICES, int), np.zeros((2, 2), int)
            rows = router.table.rows_of(batch.ids_BQ, batch.left_BC).tolist()
            for stream, row_Q in enumerate(rows):
                for row in row_Q:
                    slices = [
                        e for g, _ in experts_of(router, row, k) for e in range(sum(SIZES[:g]), sum(SIZES[: g + 1]))
                    ]
                    want[slices] += 1
                    for home in {e // 4 for e in slices}:
                        sent[stream // 2, home] += 1
            assert counts.count_ymgE[number, 0, 0].tolist() == want.tolist()
            assert counts.sent_ymgPP[number, 0, 0].tolist() == sent.tolist()


def test_state_is_restored_and_everything_that_decides_is_in_the_identity():
    moe, (router,) = config(), routers()
    (again,) = SizedRouter.restore(moe, RouterInputs(SYMBOLS, 3, 1), [router.state()])
    (built,) = SizedRouter.build(moe, RouterInputs(SYMBOLS, 3, 1, TEXT))
    for other in (again, built):
        for mine, theirs in zip(router.identity(), other.identity(), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        ids, left = tokens()
        for mine, theirs in zip(route_of(router, ids[0], left[0], 4), route_of(other, ids[0], left[0], 4), strict=True):
            assert mine is theirs or torch.equal(mine, theirs)
    save({f"{number}/{name}": value for number, r in enumerate(routers(2)) for name, value in r.state().items()})
    (other,) = SizedRouter.build(moe, RouterInputs(SYMBOLS, 3, 1, TEXT[:3000]))
    changed = zip(router.identity(), other.identity(), strict=True)
    assert any(not np.array_equal(mine, theirs) for mine, theirs in changed)


def test_what_is_refused():
    inputs = RouterInputs(SYMBOLS, 3, 1, TEXT)
    for sizes, words in (([3], "must be a multiple"), ([], "must be a list"), ([0, 8], "at least 1"), ("2", "a list")):
        with pytest.raises(UserError, match=words):
            SizedRouter.slices(MoEConfig(router="sized", experts=8, options={"sizes": sizes}))
    with pytest.raises(UserError, match=r"moe.options.size: no such option"):
        SizedRouter.slices(MoEConfig(router="sized", options={"size": [1]}))
    with pytest.raises(UserError, match="no constant, copy or null"):
        SizedRouter.build(config(null_experts=1), inputs)
    with pytest.raises(UserError, match=r"moe.weights=live"):
        SizedRouter.build(config(weights="live"), inputs)
    (router,) = SizedRouter.build(config(), inputs)
    assert router.place(Mesh(1, 2, 2)) is router
    with pytest.raises(UserError, match=r"expert \[3\] of \[4\] slices would lie on several of the 4 ranks"):
        router.place(Mesh(0, 4, 4))
