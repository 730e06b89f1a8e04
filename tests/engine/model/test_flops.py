"""FLOPs against PyTorch's own counter, on models whose expert layers are written as a textbook would."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import foreroute.engine.moe.experts
from foreroute.engine.config import MoEConfig, NgramTablesConfig, ScheduleConfig
from foreroute.engine.config.enums import Activation, Growth, NgramEntry, RouteWeights
from foreroute.engine.model.build import build_model
from foreroute.engine.model.flops import Arithmetic, forward_flops
from foreroute.engine.moe.experts import Experts
from foreroute.engine.moe.zero_experts import zero_experts
from foreroute.engine.ngram_tables.row_rules import RowSGD
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.k_schedule import active_experts
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.plans.planner import Planner
from foreroute.engine.routing.row_sets import Choice, RowSets, equal_weights
from foreroute.engine.testing.tiny_run import EXPERTS, LAYERS, SEGMENT, STREAMS, SYMBOLS, tiny_config

K, TOKENS = 3, STREAMS * SEGMENT


def textbook_moe(x_RD, weight_N, weights, rows, **_):
    """Each expert's rows through two products (three, if gated), each added up where it came from."""
    out_RD = torch.zeros_like(x_RD)
    start = 0
    for expert, end in enumerate(rows.offset_L.tolist()):
        source = rows.source_N[start:end]
        x_nD = x_RD[source]
        hidden = x_nD @ weights.w1_LFD[expert].T + weights.b1_LF[expert]
        gate = None if weights.w3_LFD is None else x_nD @ weights.w3_LFD[expert].T
        hidden = F.relu(hidden) if gate is None else F.silu(hidden) * gate
        y_nD = hidden @ weights.w2_LFD[expert] + weights.b2_LD[expert]
        out_RD = out_RD.index_add(0, source, y_nD * weight_N[start:end, None])
        start = end
    return out_RD


def useful_flops(config, k):
    return forward_flops(config.model, config.moe, streams=STREAMS, segment=SEGMENT, vocab=SYMBOLS, k=k)


def counted(config, monkeypatch):
    """What PyTorch counts in a forward and a backward pass with the memory full: (forward, both)."""
    monkeypatch.setattr(foreroute.engine.moe.experts, "moe_ffn", textbook_moe)
    torch.manual_seed(0)
    model, width = build_model(config, SYMBOLS), config.model.width
    memory = [torch.randn(STREAMS, config.model.memory, width) for _ in range(LAYERS)]
    order_TK = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :K]
    plans = None
    if config.moe.router == "hashed":
        weigh = None if config.moe.weights is RouteWeights.live else equal_weights
        sets = RowSets(order_TK.to(torch.uint8), weigh)
        plans = (Planner(EXPERTS).plan(Choice(np.arange(TOKENS)[None], sets), K),)
    ids = torch.randint(0, SYMBOLS, (STREAMS, SEGMENT))
    with FlopCounterMode(display=False) as forward:
        output = model(ids, ids, memory, Routing(K, plans))
    with FlopCounterMode(display=False) as backward:
        output.loss.backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


MODELS = {
    "dense": {"router": "dense"},
    "hashed": {"router": "hashed"},
    "experts in the last layer": {"router": "hashed", "layers": [1], "plain_width": 7},
    "gated": {"activation": Activation.swiglu, "shared_width": 5},
    "frozen": {"router": "frozen"},
    "learned": {"router": "learned"},
    "gate": {"weights": RouteWeights.live},
    "residual": {"shared_width": 5, "residual": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_pytorch_counts(name, monkeypatch):
    """Exactly, but for what is done in vain: keys that a query may not see, and one column more of every tile's
    distances.

    Backward counts two products for each one of forward. Two have one only: the encoded distances and a frozen gate get
    no gradient.
    """
    config = tiny_config()
    config = replace(config, moe=replace(config.moe, **MODELS[name]))
    model = config.model
    inner, keys = model.heads * model.head_width, model.memory + SEGMENT
    in_vain = keys - (model.memory + (SEGMENT + 1) / 2)  # keys that a query may not see, on average
    column = LAYERS * 2 * TOKENS * inner
    no_gradient = LAYERS * 2 * keys * inner * model.width
    if name == "frozen":
        no_gradient += LAYERS * 2 * TOKENS * EXPERTS * model.width
    forward, both = counted(config, monkeypatch)
    useful = useful_flops(config, K)
    assert useful == forward - column * (3 * in_vain + 1)
    step = Arithmetic(config, SYMBOLS, 0).step_flops(K)
    assert step == both - column * (9 * in_vain + 3) + no_gradient
    assert step == pytest.approx(both, rel=0.15)  # so much in such a small model, with half a segment hidden


def test_flops_follow_k(monkeypatch):
    """Negative control: one expert more, or another router's gate, is another number."""
    config = tiny_config()
    found = [useful_flops(config, k) for k in (1, 2, 3)]
    expert = LAYERS * 2 * 2 * TOKENS * config.model.width * config.moe.expert_width
    assert found[1] - found[0] == found[2] - found[1] == expert
    forward, _ = counted(config, monkeypatch)
    assert abs(forward - found[2]) < expert < abs(forward - found[0])


def test_flops_since_the_start_are_the_sum_over_the_steps():
    config = tiny_config()
    config = replace(config, schedule=ScheduleConfig(Growth.linear, 1, 4))
    arithmetic = Arithmetic(config, SYMBOLS, 0)
    total, ks = 0.0, set()
    for step in range(10):
        assert arithmetic.flops_before(step) == pytest.approx(total, rel=1e-12)
        k = active_experts(config.schedule, step, config.train.steps)
        ks.add(k)
        total += 3 * useful_flops(config, k)
    assert ks == {1, 2, 3, 4}


@pytest.mark.parametrize("activation", Activation)
def test_active_parameters_are_those_of_k_experts(activation):
    config = tiny_config()
    config = replace(
        config,
        model=replace(config.model, ngram=2, ngram_rows=30),
        moe=replace(config.moe, activation=activation, shared_width=3),
    )
    model = build_model(config, SYMBOLS)
    total = sum(p.numel() for p in model.parameters())
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    held = sum(p.numel() for layer in experts for p in layer.parameters())
    held_n_grams = 29 * config.model.width
    arithmetic = Arithmetic(config, SYMBOLS, total - model.num_unread)
    for k in range(1, EXPERTS + 1):
        assert arithmetic.active_parameters(k) == total - held_n_grams - held + held * k / EXPERTS
    dense = replace(config, moe=MoEConfig(router="dense"))
    assert Arithmetic(dense, SYMBOLS, total - model.num_unread).active_parameters(2) == total - held_n_grams


def test_of_experts_without_rows_only_constants_compute():
    """Of k experts drawn evenly from all kinds, the share with rows has products, and all constants have theirs; the
    others' vectors count in full."""
    config = tiny_config()
    plain, zero = config, replace(config, moe=replace(config.moe, constant_experts=1, copy_experts=1, null_experts=2))
    totals = [sum(p.numel() for p in build_model(each, SYMBOLS).parameters()) for each in (plain, zero)]
    constants = LAYERS * 3 * config.model.width  # a vector, and what mixes it with the token
    assert totals[1] == totals[0] + constants
    with FlopCounterMode(display=False) as counter:
        zero_experts(config.model.width, zero.moe)(torch.randn(TOKENS, config.model.width), torch.rand(TOKENS, 4))
    for k in (2, 4):  # of 8 columns 4 have rows
        assert useful_flops(zero, k) == useful_flops(plain, k // 2) + LAYERS * counter.get_total_flops()
        active = Arithmetic(zero, SYMBOLS, totals[1]).active_parameters(k)
        assert active == Arithmetic(plain, SYMBOLS, totals[0]).active_parameters(k // 2) + constants


def test_ks_are_those_of_schedule_and_evaluation():
    config = tiny_config()
    evaluation = dataclasses.replace(config.eval, k=[4, 1])
    config = replace(config, schedule=ScheduleConfig(k_min=1, k_max=2), eval=evaluation)
    assert Arithmetic(config, SYMBOLS, 0).by_k() == {"1": 1, "2": 2, "4": 4}
    grown = replace(config, schedule=ScheduleConfig(Growth.linear, 2, 4))
    assert list(Arithmetic(grown, SYMBOLS, 0).by_k()) == ["1", "2", "3", "4"]
    dense = replace(config, moe=MoEConfig(router="dense"))
    assert list(Arithmetic(dense, SYMBOLS, 0).by_k()) == ["dense"]


@pytest.mark.parametrize("k", [1, 4])
def test_a_symbol_is_one_forward_pass_of_the_step_shared_out(k):
    """A step is a forward pass and a backward one of twice its products."""
    arithmetic = Arithmetic(tiny_config(), SYMBOLS, 1000)
    step = arithmetic.step_flops(k)
    assert arithmetic.flops_per_symbol(k) == pytest.approx(step / 3 / TOKENS)
    assert step == 3 * useful_flops(tiny_config(), k)


@pytest.mark.parametrize("layers", [[0, 1], [1]], ids=str)
@pytest.mark.parametrize("entry", NgramEntry, ids=lambda entry: entry.name)
def test_entries_of_tables(entry, layers):
    """Beyond the model without tables, with the memory full; vectors that are as wide as they must be cost nothing."""
    for width in (3, 4):  # 4 heads of 4 are as wide as the model and its values
        tables = NgramTablesConfig(rows=9, heads=2, width=width, layers=layers, entry=entry)
        config = replace(tiny_config(moe={"router": "dense"}), ngram_tables=tables)
        model, memory = build_model(config, SYMBOLS), config.model.memory
        model.ngram_tables.hold(Mesh(), RowSGD())
        for table in model.ngram_tables.tables:
            table._landed_RW = torch.zeros(1, width)
        kept = {"values": (memory, 4 * width), "gate": (9, 16), "per_layer": (9, 16)}.get(entry.name)
        held = [torch.zeros(STREAMS, memory, 16) for _ in range(LAYERS)]
        both = [*held, *(torch.zeros(STREAMS, *kept) for _ in layers if kept is not None)]
        ids, landed = torch.zeros(STREAMS, SEGMENT).long(), torch.zeros(STREAMS, SEGMENT, 4).long()
        with FlopCounterMode(display=False) as with_tables, torch.no_grad():
            model(ids, ids, both, Routing(K, None, landed_BQH=(landed,) * len(layers)))
        model.ngram_tables = None
        with FlopCounterMode(display=False) as without, torch.no_grad():
            model(ids, ids, held, Routing(K, None))
        sizes = {"streams": STREAMS, "segment": SEGMENT, "vocab": SYMBOLS, "k": K}
        more = forward_flops(config.model, config.moe, **sizes, tables=tables) - useful_flops(config, K)
        assert more == with_tables.get_total_flops() - without.get_total_flops()
        assert (more == 0) == (width == 4 and entry.name in ("add", "values"))
