"""Checkpoints of smaller models evaluate as they must: pairs of equal experts merge without loss, an expert that no
token uses is pruned without a changed bit, int8 costs less than a thousandth."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foreroute.engine.checkpoint import save_load as checkpoint
from foreroute.engine.checkpoint.trained_run import open_saved
from foreroute.engine.compress import saved
from foreroute.engine.compress.choose import By, Method, Request, check_run, choose, smaller
from foreroute.engine.compress.groups import DROPPED
from foreroute.engine.config import Activation, MoEConfig, RouteWeights, Split
from foreroute.engine.errors import UserError
from foreroute.engine.evaluation.held_out import evaluate
from foreroute.engine.moe.int8_weights import Int8
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.testing.saved_run import save_model, untrained_run

E, F, D, K = 8, 6, 16, 3
STEP = "checkpoints/step-00000003"


def a_run(folder, **moe):
    return untrained_run(folder, k=K, experts=E, expert_width=F, **moe)


def request(method, by, experts, split=Split.train, k=K):
    return Request(method, by, experts, k, split, symbols=512, seed=1)


def rewritten(folder, run, change, moe=None):
    """Save the run, change its checkpoint and open the result."""
    save_model(folder / "run", run)
    saved.rewrite(folder / "run" / STEP, folder / "new" / STEP, change, {})
    config = run.config if moe is None else replace(run.config, moe=moe, eval=replace(run.config.eval, k=[1]))
    return open_saved(folder / "new", config, print)


def with_fewer(folder, run, asked):
    """The run with merged or pruned experts, and the choices."""
    choices = choose(run, asked)
    moe = smaller(run.config.moe, asked.experts)
    return rewritten(folder, run, lambda tensors: saved.with_groups(tensors, choices, E), moe), choices


def shapes_of(model):
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def bpc(run, k, split=Split.test):
    return evaluate(run, split=split, k=k).bpc


ORDER = torch.tensor([3, 0, 5, 1, 4, 2])


def fill(run, drawn):
    """Draw that many experts for each layer; the others repeat them with their hidden units in another order."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in run.model.blocks:
            for name, value in block.moe.experts.named_parameters():
                value.normal_(0, 0.5, generator=generator)
                for expert in range(drawn, E):
                    value[expert] = value[expert - drawn] if name == "b2" else value[expert - drawn][ORDER]


OPTIONS = [{"activation": Activation.swiglu}, {"share_table": True, "weights": RouteWeights.sum}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_experts_merge_without_loss(tmp_path, options):
    run = a_run(tmp_path, **options)
    fill(run, drawn=1)
    found, _ = with_fewer(tmp_path, run, request(Method.merge, By.random, 4))
    for k in (1, K):
        assert bpc(found, k) == pytest.approx(bpc(run, k), rel=1e-6)
    assert found.model.blocks[0].moe.experts.w1.shape == (4, F, D)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_expert_joins_the_one_that_it_equals(tmp_path, options):
    """Of four pairs of equal experts, one expert is to go; a random partner costs something."""
    run = a_run(tmp_path, **options)
    fill(run, drawn=4)
    found, choices = with_fewer(tmp_path, run, request(Method.merge, By.outputs, 7))
    for choice in choices:
        (pair,) = (np.flatnonzero(choice.groups.group_E == g).tolist() for g in range(7) if choice.groups.sizes[g] > 1)
        assert pair[1] - pair[0] == 4
    assert bpc(found, K) == pytest.approx(bpc(run, K), rel=1e-6)
    drawn, _ = with_fewer(tmp_path / "drawn", run, request(Method.merge, By.random, 7))
    assert abs(bpc(drawn, K) - bpc(run, K)) > 1e-4


def test_experts_that_no_token_uses_are_pruned_without_a_changed_bit(tmp_path):
    """The tables are such that the first K of a row are never experts 2 and 5; pruning others changes bits."""
    run = a_run(tmp_path)
    for router in run.routers:
        unused_rE = (router.table.order_rE == 2) | (router.table.order_rE == 5)
        router.table.order_rE[:] = router.table.order_rE.gather(1, unused_rE.int().argsort(dim=1, stable=True))
    found, choices = with_fewer(tmp_path, run, request(Method.prune, By.use, 6))
    assert all((choice.groups.group_E == DROPPED).nonzero()[0].tolist() == [2, 5] for choice in choices)
    assert all(choice.use_E[[2, 5]].sum() == 0 for choice in choices)
    for k in (1, K):
        assert bpc(found, k) == bpc(run, k)
    drawn, _ = with_fewer(tmp_path / "drawn", run, request(Method.prune, By.random, 6))
    assert bpc(drawn, K) != bpc(run, K)


def test_use_is_counted_on_the_split_and_at_the_k_asked_for(tmp_path):
    run = a_run(tmp_path)
    for split, k in ((Split.train, K), (Split.valid, 2)):
        choices = choose(run, request(Method.prune, By.use, 6, split, k))
        assert all(choice.use_E.sum() == k * len(run.corpus.split(split)) for choice in choices)


@pytest.mark.parametrize(("precision", "router"), [("fp32", "learned"), ("bf16", "hashed")])
def test_int8_costs_less_than_a_thousandth_and_holds_a_quarter(tmp_path, precision, router):
    run = a_run(tmp_path, activation=Activation.swiglu, router=router)
    run = replace(run, config=replace(run.config, train=replace(run.config.train, precision=precision)))
    save_model(tmp_path / "run", run)
    wide = open_saved(tmp_path / "run", run.config, print)
    found = rewritten(tmp_path, run, saved.with_int8)
    experts = found.model.blocks[0].moe.experts
    assert experts.w1.dtype == wide.model.blocks[0].moe.experts.w1.dtype
    held = sum(t.nbytes for t in [*experts.parameters(), *experts.buffers()])
    bias = 4 if precision == "fp32" else 2
    assert held == E * (3 * F * D + 4 * (2 * F + D) + bias * (F + D))
    assert all(module.dtype == experts.w1.dtype for module in found.model.modules() if isinstance(module, Int8))
    near = 1e-3 if router == "hashed" else 1e-2  # of a learned router, some routes of an untrained model change
    for k in (1, K):
        assert bpc(found, k) == pytest.approx(bpc(wide, k), rel=near) and bpc(found, k) != bpc(wide, k)
    with pytest.raises(UserError, match="has int8 weights, for evaluation alone"):
        checkpoint.load(tmp_path / "new" / STEP, SimpleNamespace(mesh=Mesh(), shapes=lambda: shapes_of(run.model)))
    with torch.no_grad():  # a control: half of the scale is another model
        for module in found.model.modules():
            if isinstance(module, Int8):
                module.scale /= 2
    assert bpc(found, K) != pytest.approx(bpc(wide, K), rel=near)


def test_everything_else_of_a_checkpoint_stays(tmp_path):
    run = a_run(tmp_path)
    save_model(tmp_path / "run", run)
    choices, seen = choose(run, request(Method.merge, By.use, 4)), {}

    def change(tensors):
        seen.update(before=tensors, after=saved.with_groups(tensors, choices, E))
        return seen["after"]

    manifest = saved.rewrite(tmp_path / "run" / STEP, tmp_path / "new" / STEP, change, {"config": "other"})
    kept = {key for key in seen["before"] if ".experts." not in key and not key.startswith("table/")}
    assert all(torch.equal(seen["before"][key], seen["after"][key]) for key in kept)
    old = checkpoint.read_manifest(tmp_path / "run" / STEP)
    assert {**old, "config": "other", "files": 0, "tensors": 0} == {**manifest, "files": 0, "tensors": 0}
    assert manifest["tensors"].keys() == seen["after"].keys() > kept
    experts = 4 * (2 * F * D + F + D) * 4 * len(run.model.blocks)
    assert [saved.expert_bytes(seen[when]) for when in ("before", "after")] == [2 * experts, experts]


@pytest.mark.parametrize(
    ("options", "asked", "ranks", "line"),
    [
        ({"router": "dense"}, {}, 1, "moe.router=dense: the run has no experts"),
        ({"router": "learned"}, {}, 1, "moe.router=learned: has no tables of all experts"),
        ({"router": "sized", "options": {"sizes": [1, 3]}}, {}, 1, "moe.router=sized: has no tables of all experts"),
        ({"weights": RouteWeights.live}, {}, 1, "moe.weights=live: its gate weighs each expert"),
        ({"by_layer": {0: {"experts": 4}}}, {}, 1, "moe.by_layer: must be empty"),
        ({}, {"experts": 8}, 1, "experts=8: must be 1 to 7, as the run has 8"),
        ({}, {"experts": 6}, 4, "experts=6: must be divisible by ranks=4"),
        ({}, {"method": Method.prune}, 1, "by=outputs: goes with method=merge"),
    ],
)
def test_what_cannot_be_made_smaller_is_refused(options, asked, ranks, line):
    moe = MoEConfig(experts=E, **options)
    whole = {"method": Method.merge, "by": By.outputs, "experts": 4} | asked
    with pytest.raises(UserError, match=f"^{line}"):
        check_run(moe, request(**whole), ranks)


def test_merged_experts_merge_again_and_are_not_pruned(tmp_path):
    run = a_run(tmp_path)
    found, _ = with_fewer(tmp_path, run, request(Method.merge, By.use, 6))
    again = choose(found, request(Method.merge, By.outputs, 4))
    assert all(len(choice.groups.group_E) == 6 for choice in again)
    with pytest.raises(UserError, match=r"^method=prune: experts of the run were merged"):
        choose(found, request(Method.prune, By.use, 4))
