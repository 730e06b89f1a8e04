"""moe.router=top_p against the published rule, plain loops over tokens, a certificate and a run of two ranks."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from foreroute.engine.certificate.counts.exact import certify
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.certificate.memory.sizes import Sizes, bounded_rows, exact_rows
from foreroute.engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    Growth,
    ModelConfig,
    MoEConfig,
    ScheduleConfig,
    TrainConfig,
)
from foreroute.engine.errors import UserError
from foreroute.engine.evaluation.table_balance import balances
from foreroute.engine.model.flops import forward_flops
from foreroute.engine.routing.planned.top_p import TopPRouter
from foreroute.engine.routing.planned_router import GroupTokens, RouterInputs
from foreroute.engine.routing.tables import row_frequency
from foreroute.engine.testing.planned import planned_counts, planned_weights, plans_of
from foreroute.engine.testing.ranks import Program, rank_environments
from foreroute.launch.testing.runs import TRAIN_CODE, read_losses, small_run
from tests.references.planned_sets import plain_plans
from tests.references.top_p import below_threshold, dynamic_top_p, mean_number, softmax, solve_threshold

VOCAB = 30
MOE = MoEConfig(router="top_p", experts=8, ngram=2, rows=300)
COPIES = replace(MOE, constant_experts=1, copy_experts=2, null_experts=1)
LEAST_0 = replace(MOE, options={"least": 0})
KINDS = pytest.mark.parametrize("moe", [MOE, LEAST_0, COPIES], ids=["least 1", "least 0", "copies"])


def text(size=20_000, vocab=VOCAB, seed=0):
    share = 1 / np.arange(3, vocab + 3)
    return np.random.default_rng(seed).choice(vocab, size, p=share / share.sum()).astype(np.uint8)


def build(moe=MOE, *, number=1, ids=None, vocab=VOCAB, seed=5):
    return TopPRouter.build(moe, RouterInputs(vocab, seed, number, text(vocab=vocab) if ids is None else ids))


def weights_of(table):
    """The weights of all rows by place in the order, in fp64."""
    return [softmax(row) for row in table.logits_rE.tolist()]


@pytest.mark.method
@KINDS
@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_sets_are_those_of_the_published_rule_at_the_solved_threshold(moe, k):
    (router,) = build(moe)
    table, least = router.table, moe.options.get("least", 1)
    uses_r = row_frequency(table, text()).astype(int)
    seen, all_weights = np.flatnonzero(uses_r), weights_of(table)
    rows, uses = [all_weights[row] for row in seen], uses_r[seen].tolist()
    thresholds = solve_threshold(rows, uses, k, least)
    threshold = min(thresholds, key=lambda tau: abs(mean_number(rows, uses, tau, least) - k))
    rule, sets = dynamic_top_p if least else below_threshold, router.row_sets(k)
    for row, weights in zip(seen, rows, strict=True):
        places = rule(weights, threshold)  # a table's columns are in the order of their weights
        assert sets.order_rK[row, : sets.count_r[row]].tolist() == table.order_rE[row, places].tolist()
    other = [len(rule(weights, threshold + 0.02)) for weights in rows]  # negative control
    assert k == 1 or other != sets.count_r[seen].tolist()


@pytest.mark.method
def test_raw_weights_are_the_published_ones():
    (router,) = build(replace(MOE, options={"raw": True}))
    (normalised,) = build()
    sets, other = router.row_sets(3), normalised.row_sets(3)
    assert torch.equal(sets.count_r, other.count_r) and torch.equal(sets.order_rK, other.order_rK)
    weight_rE, one_rE = sets.dense_weights(8), other.dense_weights(8)
    for row, weights in enumerate(weights_of(router.table)):
        count = int(sets.count_r[row])
        chosen = router.table.order_rE[row, :count].long()
        want = torch.zeros(8, dtype=torch.float64).scatter_(0, chosen, torch.tensor(weights[:count]).double())
        torch.testing.assert_close(weight_rE[row].double(), want, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(one_rE[row].double(), want / want.sum(), rtol=1e-5, atol=1e-8)


def check_numbers(router, train, held_out):
    """The mean on both texts, nested numbers, and an even load."""
    use_r, other_r = row_frequency(router.table, train), row_frequency(router.table, held_out)
    before_r = 0
    for k in range(1, router.columns + 1):
        count_r = router.table.count_r(k).numpy()
        assert abs(count_r @ use_r / use_r.sum() - k) <= use_r.max() / use_r.sum() / 2 + 1e-12
        assert count_r @ other_r / other_r.sum() == pytest.approx(k, rel=0.01)
        assert (count_r >= before_r).all() and (count_r[use_r == 0] == k).all()
        before_r = count_r
    load = {found.k: found.experts for found in balances(router.table, train, ())}
    assert max(load[k] for k in (1, 2, 4, 8)) < 1.01


@pytest.mark.method
@KINDS
def test_numbers_on_the_training_text_and_on_another(moe):
    (router,) = build(replace(moe, rows=4096), ids=text(200_000, 200), vocab=200)
    check_numbers(router, text(200_000, 200), text(50_000, 200, seed=1))


@pytest.mark.method
@pytest.mark.parametrize("ngram", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_numbers_on_real_text(ngram):
    if "FOREROUTE_DATA" not in os.environ:
        pytest.skip("FOREROUTE_DATA is not set")
    (path,) = (Path(os.environ["FOREROUTE_DATA"]) / "enwik8_prefix").glob("enwik8.first*")
    ids = np.fromfile(path, np.uint8)
    train, held_out = ids[: ids.size * 9 // 10], ids[ids.size * 9 // 10 :]
    (router,) = build(replace(MOE, experts=16, ngram=ngram, rows=65536), ids=train, vocab=256)
    check_numbers(router, train, held_out)


def test_two_builds_are_equal_and_tables_differ():
    first, second = build(COPIES, number=2), build(COPIES, number=2)
    for one, other in zip(first, second, strict=True):
        assert all((a == b).all() for a, b in zip(one.identity(), other.identity(), strict=True))
    assert not torch.equal(first[0].table.first_rE, first[1].table.first_rE)


def test_saved_routers_are_made_again_without_a_text():
    moe = replace(COPIES, options={"raw": True})
    routers = build(moe, number=2)
    again = TopPRouter.restore(moe, RouterInputs(VOCAB, 5, 2), [router.state() for router in routers])
    for one, other in zip(routers, again, strict=True):
        for k in (1, 3, 12):
            assert torch.equal(one.row_sets(k).dense_weights(12), other.row_sets(k).dense_weights(12))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("moe", [LEAST_0, COPIES], ids=["least 0", "copies"])
def test_plans_equal_loops_over_tokens(moe, chunks, ranks):
    (router,) = build(moe)
    table, k = router.table, 2
    ids = torch.from_numpy(text(ranks * 240, seed=2).astype(np.int64)).view(ranks, 2, 120)
    left = torch.from_numpy(text(ranks * 2, seed=3).astype(np.int64)).view(ranks, 2, 1)
    counts, sets = table.count_r(k).tolist(), []
    for rank in range(ranks):
        for row in table.rows_of(ids[rank], left[rank]).flatten().tolist():
            count = counts[row]
            columns, logits = table.order_rE[row, :count].tolist(), table.logits_rE[row, :count].tolist()
            sets.append(dict(zip(columns, softmax(logits) if count else [], strict=True)))
    want = plain_plans(sets, 8, ranks)
    plans = plans_of(router, GroupTokens(ids, left), k, chunks=chunks)
    assert len({len(each) for each in sets}) > 2 and any(not each.keys() & set(range(8)) for each in sets)
    assert planned_weights(plans) == pytest.approx(want.weights, rel=1e-5)
    for plan in plans:
        assert plan.k == k and plan.count_E.tolist() == want.counts
        if ranks > 1:
            assert list(plan.send_splits) == want.sent[plan.rank]
            assert list(plan.recv_splits) == [sent[plan.rank] for sent in want.sent]
    if moe is COPIES:
        weight_TJ = torch.cat([plan.column_weight_TJ for plan in plans])
        for found, columns in zip(weight_TJ.tolist(), want.at_home, strict=True):
            assert found == pytest.approx([columns.get(column, 0.0) for column in range(8, 12)], rel=1e-5)


def run_of(moe):
    return Config(
        data=DataConfig(streams=16, segment=40),
        model=ModelConfig(layers=2, width=6),
        moe=moe,
        schedule=ScheduleConfig(Growth.linear, 1, 5),
        train=TrainConfig(steps=12, accumulation=2),
        eval=EvalConfig(k=[1]),
    )


@KINDS
def test_a_certificate_is_exact(moe):
    config, ids = run_of(moe), text()
    routers, layout = build(moe, number=2), Layout(config, Placement(8, 4, 2))
    for counts in replay(layout, ids, routers, range(0, 12, 3)):
        sent_ymgPP, count_ymgE = planned_counts(layout, ids, routers, counts.step)
        assert (counts.sent_ymgPP == sent_ymgPP).all() and (counts.count_ymgE == count_ymgE).all()
    other = next(replay(layout, ids, build(moe, number=2, seed=6), [3]))  # negative control
    assert (other.count_ymgE != planned_counts(layout, ids, routers, 3)[1]).any()


@KINDS
def test_arithmetic_is_that_of_the_mean(moe):
    """The experts' rows that a certificate counts are those of forward_flops, within what a short text deviates."""
    moe = replace(moe, rows=4096)
    config = replace(run_of(moe), schedule=ScheduleConfig(k_max=4), train=TrainConfig(steps=80))
    ids = text(60_000, 200)
    routers, layout = build(moe, number=2, ids=ids, vocab=200), Layout(config, Placement(2, 2, 2))
    counted = certify(layout, ids, routers).whole.expert_rows.mean * moe.experts / (2 * layout.tokens)

    def flops(k):
        return forward_flops(config.model, moe, streams=16, segment=40, vocab=200, k=k)

    one_row = 2 * 2 * config.model.width * moe.expert_width  # two products, a multiplication and an addition each
    counted_flops = 2 * 16 * 40 * counted * one_row  # of two layers
    assert counted_flops == pytest.approx(flops(8) - flops(4), rel=0.01)


def test_bounds_at_other_micro_batches_are_never_below_the_truth(monkeypatch):
    """A token may have more than k experts, so k rows of each are no bound."""
    ids, found = text(), {}
    for accumulation in (1, 2, 4, 8, 16):
        train = TrainConfig(steps=2, accumulation=accumulation)
        config = replace(run_of(MOE), schedule=ScheduleConfig(k_max=2), train=train)
        layout = Layout(config, Placement(1, 1, 1))
        (section,) = certify(layout, ids, build(number=2)).by_k
        sizes = Sizes(layout, VOCAB, layout.streams, 2, False)
        found[layout.streams] = sizes, exact_rows(section, sizes)

    def holds():
        pairs = [
            (found[streams], bounded_rows(known, found[streams][0], number))
            for number, (_, known) in found.items()
            for streams in found
        ]
        return all(
            bound.computed >= truth.computed and bound.computed_all >= truth.computed_all for (_, truth), bound in pairs
        )

    assert holds()
    monkeypatch.setattr(TopPRouter, "at_most_k", True)  # negative control
    assert not holds()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {"least": 2}}, "moe.options.least=2: must be in 0 .. 1"),
        ({"options": {"most": 2}}, "moe.options.most: no such option of moe.router=top_p; it has least, raw"),
        ({"options": {"raw": True}, "weights": "uniform"}, "moe.options.raw=true with moe.weights=uniform: needs"),
    ],
)
def test_what_is_refused(changes, words):
    with pytest.raises(UserError) as error:
        build(replace(MOE, **changes))
    assert words in str(error.value) and "\n" not in str(error.value)


def train(folder, ranks, *options):
    """Run 20 steps on some ranks; the losses by step, and what rank 0 printed."""
    kind = ["moe.router=top_p", "moe.copy_experts=2", "moe.null_experts=1"]
    whole = [*small_run(folder), *kind, f"train.runs_dir={folder}", f"parallel.expert_ranks={ranks}", *options]
    whole += ["train.log_every=1", "train.save_every=10", "schedule.k_max=5"]
    programs = [Program(TRAIN_CODE, whole, environment) for environment in rank_environments(ranks)]
    try:
        found = [program.wait() for program in programs]
    finally:
        for program in programs:
            program.__exit__()
    assert [code for code, *_ in found] == [0] * ranks, found
    return read_losses(folder), found[0][1]


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_on_two_ranks_is_that_of_one_and_can_be_resumed(tmp_path):
    alone, _ = train(tmp_path, 1)
    shutil.rmtree(tmp_path / "debug")
    losses, _ = train(tmp_path, 2)
    assert len(losses) == 20 and losses == pytest.approx(alone, rel=1e-5)
    shutil.rmtree(tmp_path / "debug/checkpoints/step-00000020")
    again, printed = train(tmp_path, 2, "train.resume=true")
    assert "resumed at step 10" in printed
    assert again == losses
