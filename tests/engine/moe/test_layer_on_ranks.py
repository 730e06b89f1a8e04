"""The expert layer on 2 and 4 gloo ranks against one rank with all tokens and all experts, in fp64.

Every case runs in one group of processes per number of ranks: starting them takes longer than all cases together.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from foreroute.engine.config import KernelsConfig, ModelConfig, MoEConfig, ParallelConfig
from foreroute.engine.config.enums import ExchangeKind, Gate, RouteWeights, WireFormat
from foreroute.engine.moe.exchange import Local, build_exchange
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.routing.plan import Route, Routing
from foreroute.engine.routing.plans.live_plan import build_live_plan
from foreroute.engine.routing.plans.planner import Planner
from foreroute.engine.routing.row_sets import Choice, RowSets, softmax_weights
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.routers import hashed, plan_of, route_of

EXPERTS, SYMBOLS, WIDTH, HIDDEN = 8, 9, 12, 16
REPLICATED = "router", "shared", "coefficient", "gate", "zero_experts"
MARGIN = 1e-5  # between the last expert chosen and the first that is not: fp32 gates must agree


class Case(NamedTuple):
    router: str
    exchange: ExchangeKind = ExchangeKind.tokens
    chunks: int = 1
    recompute: bool = False
    dropout: float = 0.0
    k: int = 3
    tokens: int = 23
    symbols: int = SYMBOLS  # 1: all tokens choose alike, so ranks and experts get nothing
    wire: WireFormat = WireFormat.model
    masked_from_k: int = EXPERTS + 1
    shared_width: int = 0
    residual: bool = False
    gate: Gate | None = None  # of live weights
    zero: int = 0  # constants and copies, as many of each


KINDS = ExchangeKind.tokens, ExchangeKind.gather
LIVE = "frozen", "learned"
MATRIX = [Case(*options) for options in itertools.product(("hashed", *LIVE), KINDS, (1, 4), (False, True), (0.0, 0.3))]
OTHERS = [
    Case(router, exchange, chunks, **other)
    for router, exchange, chunks in itertools.product(("hashed", *LIVE), KINDS, (1, 4))
    for other in ({"tokens": 3}, {"tokens": 1}, {"k": 1}, {"k": EXPERTS})
]
SKEWED = [Case("hashed", exchange, chunks, symbols=1, k=1) for exchange, chunks in itertools.product(KINDS, (1, 4))]
MASKED = [Case("hashed", chunks=4, masked_from_k=1), Case("frozen", chunks=4, masked_from_k=1)]
SHARED = [Case("hashed", exchange, dropout=dropout, shared_width=10) for exchange in KINDS for dropout in (0.0, 0.3)]
GATED = [
    Case("hashed", *options, gate=gate)
    for *options, gate in itertools.product(KINDS, (1, 4), (False, True), (Gate.softmax, Gate.sqrt_softplus))
]
MIXED = [
    *(Case("hashed", exchange, chunks, dropout=0.3, zero=2) for exchange, chunks in itertools.product(KINDS, (1, 4))),
    *(Case("hashed", exchange, shared_width=10, residual=True) for exchange in KINDS),
]
BF16 = [Case("hashed", exchange, chunks, wire=WireFormat.bf16) for exchange in KINDS for chunks in (1, 4)]
ALL = MATRIX + OTHERS + SKEWED + MASKED + SHARED + GATED + MIXED + BF16


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_layer(case):
    """All experts, no exchange: the same on every rank."""
    torch.manual_seed(3)
    moe = MoEConfig(
        router=case.router,
        experts=EXPERTS,
        expert_width=HIDDEN,
        balance_loss=0.5,
        z_loss=0.1,
        shared_width=case.shared_width,
        residual=case.residual,
        constant_experts=case.zero,
        copy_experts=case.zero,
        **({} if case.gate is None else {"weights": RouteWeights.live, "gate": case.gate, "gate_scale": 1.5}),
    )
    model = ModelConfig(layers=1, width=WIDTH, heads=2, head_width=6)
    layer = MoELayer(
        model.width, moe, KernelsConfig(masked_from_k=case.masked_from_k), 1, dropout=case.dropout
    ).double()
    for index, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=8 + index)
    return layer


def problem(case, ranks):
    """Ids, their left context, input and cotangent of the whole group."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, case.symbols, (ranks, 1, case.tokens), generator=generator)
    left = torch.randint(0, case.symbols, (ranks, 1, 1), generator=generator)
    count = ranks * case.tokens
    return ids, left, normal(count, WIDTH, seed=6), normal(count, WIDTH, seed=7)


@functools.cache
def make_table(zero=0):
    text = np.random.default_rng(0).integers(0, SYMBOLS, 900).astype(np.uint8)
    moe = MoEConfig(experts=EXPERTS, ngram=2, rows=32, constant_experts=zero, copy_experts=zero)
    return build_tables(moe, SYMBOLS, text, num_tables=1, seed=1, cache_dir=None)[0]


def make_router(case, rank=0, ranks=1):
    weights = RouteWeights.table if case.gate is None else RouteWeights.live
    return hashed(make_table(case.zero), rank=rank, ranks=ranks, weights=weights, experts=EXPERTS)


def run(layer, case, x, cotangent, plan, token_T, *, parts=1):
    """Output, gradients by name, collectives in forward, output's counts. parts: ranks that add up to the whole."""
    x = x.clone().requires_grad_()
    call = Routing(case.k, None if plan is None else (plan,), token_T, dropout_seed=11)
    out = checkpoint(layer, x, call, use_reentrant=False) if case.recompute else layer(x, call)
    forward = getattr(layer.exchange, "comm", None)
    forward = None if forward is None else (forward.collectives, forward.sent_bytes)
    auxiliary_loss = 0.0 if out.auxiliary_loss is None else out.auxiliary_loss
    ((out.y_TD * cotangent).sum() + auxiliary_loss / parts).backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": out.y_TD.detach(), "x": x.grad, **grads}, forward, out


def truth(case, ranks):
    """One rank; how rows would travel makes no difference to it."""
    plain = Case(case.router)
    return whole(case._replace(exchange=plain.exchange, chunks=1, recompute=False, wire=plain.wire), ranks)


@functools.cache
def whole(case, ranks):
    ids, left, x, cotangent = problem(case, ranks)
    layer = make_layer(case)
    plan = None
    if case.router == "hashed":
        rows = [make_table(case.zero).rows_of(*pair).flatten() for pair in zip(ids, left, strict=True)]
        choice = Choice(torch.cat(rows)[None].numpy(), make_router(case).row_sets(case.k))
        plan = Planner(EXPERTS, columns=EXPERTS + 2 * case.zero).plan(choice, case.k)
    else:
        top = layer.router(x, case.k).logits_TE.sort(dim=1, descending=True).values
        assert case.k == EXPERTS or (top[:, case.k - 1] - top[:, case.k]).min() > MARGIN
    return run(layer, case, x, cotangent, plan, numbers(x))


def numbers(x):
    """Global numbers of the group's tokens."""
    return 1000 + torch.arange(len(x))


def share(layer, case, rank, ranks):
    """Keep this rank's experts; exchange over the group."""
    local = EXPERTS // ranks
    for name, parameter in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, nn.Parameter(parameter[rank * local : (rank + 1) * local].detach().clone()))
    layer.first_expert = rank * local
    parallel = ParallelConfig(expert_ranks=ranks, exchange=case.exchange, chunks=case.chunks, wire=case.wire)
    layer.exchange = build_exchange(ExpertGroupComm(dist.group.WORLD), parallel)
    layer.balance_comm = ExpertGroupComm(None) if case.router == "learned" else None
    made, plan = [], layer._plan
    layer._plan = lambda *arguments: made.append(plan(*arguments)) or made[-1]
    return made


def one_case(case, rank, ranks):
    """Worst error to one rank, and what was counted."""
    ids, left, x, cotangent = problem(case, ranks)
    here = slice(rank * case.tokens, (rank + 1) * case.tokens)
    layer = make_layer(case)
    made = share(layer, case, rank, ranks)
    plan = None
    if case.router == "hashed":
        gather = case.exchange is ExchangeKind.gather
        plan = plan_of(make_router(case, rank, ranks), ids, left, case.k, gather=gather, chunks=case.chunks)
    fired = count_hooks(layer.experts)
    got, forward, out = run(layer, case, x[here], cotangent[here], plan, numbers(x), parts=ranks)
    want, _, want_out = truth(case, ranks)
    local = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    errors = {}
    for name, value in got.items():
        if name.startswith(REPLICATED):
            dist.all_reduce(value)  # as data parallelism does
        expected = want[name]
        expected = expected[local] if name.startswith("experts.") else expected
        expected = expected[here] if name in "yx" else expected
        scale = want[name].norm()  # one rank may rightly have nothing
        errors[name] = ((value - expected).norm() / scale).item()
    assert torch.equal(out.count_E, want_out.count_E)
    if want_out.auxiliary_loss is not None:
        auxiliary = out.auxiliary_loss.detach().double().clone()
        dist.all_reduce(auxiliary)
        errors["auxiliary"] = abs(auxiliary.item() / ranks - want_out.auxiliary_loss.item())
    (used, *_), comm = made[0], layer.exchange.comm
    return {
        "errors": errors,
        "forward": forward,
        "total": (comm.collectives, comm.sent_bytes),
        "bytes": used.wire_bytes(WIDTH, 2 if case.wire is WireFormat.bf16 else 8),
        "parts": len(used.chunks),
        "wire_rows": used.wire_rows,
        "back": sum(used.recv_splits) - used.recv_splits[rank],
        "fired": fired,
        "router": [name for name, _ in layer.named_parameters() if "router" in name],
    }


def count_hooks(module):
    fired = {}
    for name, parameter in module.named_parameters():
        fired[name] = [0, 0]

        def once(_, name=name, kind=0):
            fired[name][kind] += 1

        parameter.register_hook(once)
        parameter.register_post_accumulate_grad_hook(lambda p, once=once: once(p, kind=1))
    return fired


def without_weights(rank, ranks):
    """The weights lie elsewhere between forward and backward, as with ZeRO-3: errors to a run in which they stay."""
    errors = []
    for chunks, gate in itertools.product((1, 4), (None, Gate.softmax)):
        case = Case("hashed", chunks=chunks, gate=gate)
        ids, left, x, cotangent = problem(case, ranks)
        here = slice(rank * case.tokens, (rank + 1) * case.tokens)
        router = make_router(case, rank, ranks)
        call = Routing(case.k, (plan_of(router, ids, left, case.k, chunks=chunks),))
        found = []
        for away in (False, True):
            layer = make_layer(case)
            share(layer, case, rank, ranks)
            y_TD = layer(x[here], call).y_TD
            for parameter in layer.parameters() if away else ():
                data = parameter.data
                parameter.data = torch.empty(0, dtype=data.dtype)
                parameter.data = data.clone()  # where backward finds them
                data.fill_(float("nan"))
            y_TD.backward(cotangent[here])
            found.append([parameter.grad for parameter in layer.parameters()])
        errors.append(torch.stack([(a - b).abs().max() for a, b in zip(*found, strict=True)]).max().item())
    return errors


def varied(ranks, tokens, k):
    generator = torch.Generator().manual_seed(4)
    order_rK = torch.rand(20, EXPERTS, generator=generator).argsort(dim=1)[:, :k].to(torch.uint8)
    count_r = torch.randint(0, k + 1, (20,), generator=generator, dtype=torch.int32)
    sets = RowSets(order_rK, softmax_weights, torch.randn(20, k, generator=generator), count_r)
    return Choice(torch.randint(0, 20, (ranks, tokens), generator=generator).numpy(), sets)


def same(got, want):
    """Compare two plans of this rank; return how many chunks they have."""
    ranks = len(want.send_splits)
    assert (got.k, got.rank) == (want.k, want.rank)
    assert (got.send_splits, got.recv_splits) == (want.send_splits, want.recv_splits)
    assert torch.equal(got.count_E, want.count_E)
    for a, b in zip(got.chunks, want.chunks, strict=True):
        a.rows.validate()
        pairs = list(zip(a.rows.tensors(), b.rows.tensors(), strict=True))
        assert (a.send is None) == (b.send is None)
        if a.send is not None:
            pairs += zip(a.send.tensors(), b.send.tensors(), strict=True)
        everything = torch.arange(ranks * want.num_tokens)
        pairs.append((a.received_R, everything if b.received_R is None else b.received_R))
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)
        torch.testing.assert_close(a.weight_N, b.weight_N)
        assert (a.send_splits, a.recv_splits) == (b.send_splits, b.recv_splits)
    return len(want.chunks)


def live_equals_planned(rank, ranks):
    """A live plan of the routes that a hashed router gives is the plan that it makes itself."""
    case = Case("hashed")
    router, checked = make_router(case, rank, ranks), 0
    for tokens, k, gather, chunks in itertools.product((1, 5, 23), (1, 3, 8), (False, True), (1, 4)):
        ids, left, *_ = problem(case._replace(tokens=tokens), ranks)
        want = plan_of(router, ids, left, k, gather=gather, chunks=chunks)
        route = route_of(router, ids[rank], left[rank], k)
        checked += same(build_live_plan(route, EXPERTS, ExpertGroupComm(None), gather=gather, chunks=chunks), want)
        # any number of experts for each token, none too
        choice = varied(ranks, tokens, k)
        want = Planner(EXPERTS, rank=rank, ranks=ranks).plan(choice, k, gather=gather, chunks=chunks)
        own = choice.sets.of_rows(torch.from_numpy(choice.row_PT[rank]))
        route = Route(own.order_rK.long(), own.weights(), own.used_rK)
        got = build_live_plan(route, EXPERTS, ExpertGroupComm(None), k, gather=gather, chunks=chunks)
        checked += same(got, want)
    return checked


def unequal(rank):
    """Ranks with unequal numbers of tokens are told so; a weight of 0 is still a choice."""
    route = Route(torch.zeros(3 + rank, 1, dtype=torch.int64), torch.zeros(3 + rank, 1))
    with pytest.raises(ValueError, match="tokens: must be equal"):
        build_live_plan(route, EXPERTS, ExpertGroupComm(None))
    plan = build_live_plan(Route(route.expert_TK[:3], route.weight_TK[:3]), EXPERTS, ExpertGroupComm(None))
    return plan.chunks[0].rows.num_rows


def everything(rank, ranks):
    return {
        "cases": [one_case(case, rank, ranks) for case in ALL],
        "without_weights": without_weights(rank, ranks),
        "live_equals_planned": live_equals_planned(rank, ranks),
        "unequal": unequal(rank),
    }


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def group(request):
    """(ranks, what each rank found)."""
    return request.param, run_ranks(everything, request.param, request.param)


def found(group, cases):
    """Of some cases, every rank's results."""
    places = {case: place for place, case in enumerate(ALL)}
    return [(case, rank, answer["cases"][places[case]]) for case in cases for rank, answer in enumerate(group[1])]


@pytest.mark.dist
def test_ranks_equal_one_rank(group):
    for case, rank, result in found(group, [case for case in ALL if case not in BF16]):
        # fp64: only the order in which sums are added up differs
        for name, error in result["errors"].items():
            assert error < 1e-12, (case, rank, name)
        assert {"y", "x", "experts.w1", "experts.b1", "experts.w2", "experts.b2"} <= set(result["errors"])
        assert (case.router == "learned") == ("router.gate_weight" in result["errors"])
        assert (case.router == "learned") == ("auxiliary" in result["errors"])


@pytest.mark.dist
def test_every_gradient_arrives_once(group):
    for case, rank, result in found(group, MATRIX + GATED):
        assert len(result["fired"]) == 4
        assert all(counts == [1, 1] for counts in result["fired"].values()), (case, rank)


def needed(case, ranks):
    """Distinct (token, other rank) pairs that need each other, by rank of the token and by the other: plain loops."""
    ids, left, *_ = problem(case, ranks)
    router = make_router(case)
    sent, received = [0] * ranks, [0] * ranks
    for rank in range(ranks):
        for row in route_of(router, ids[rank], left[rank], case.k).expert_TK.tolist():
            for other in {expert // (EXPERTS // ranks) for expert in row if expert < EXPERTS} - {rank}:
                sent[rank] += 1
                received[other] += 1
    return sent, received


@pytest.mark.dist
def test_bytes_and_collectives_of_planned_layers(group):
    """Two collectives for each chunk and direction, none about counts; bytes are predicted and the least possible."""
    ranks, _ = group
    planned = [case for case in MATRIX + OTHERS + SKEWED + GATED + MIXED + BF16 if case.router == "hashed"]
    for case, rank, result in found(group, planned):
        parts = min(case.chunks, case.tokens)
        assert result["parts"] == parts
        sent, received = needed(case, ranks)
        if case.exchange is ExchangeKind.gather:
            assert result["wire_rows"] == result["back"] == (ranks - 1) * case.tokens
        else:
            assert (result["wire_rows"], result["back"]) == (sent[rank], received[rank])
        itemsize = 2 if case.wire is WireFormat.bf16 else 8
        assert result["bytes"] == (result["wire_rows"] + result["back"]) * WIDTH * itemsize
        assert result["forward"] == (2 * parts, result["bytes"])
        if not case.recompute:
            assert result["total"] == (4 * parts, 2 * result["bytes"])
        elif parts > 1:
            assert result["total"] == (6 * parts, 3 * result["bytes"])
        else:  # recomputation ends when the experts have what they kept: their results need not travel again
            assert result["total"][0] == 5
            assert result["total"][1] == 2 * result["bytes"] + result["wire_rows"] * WIDTH * itemsize
        assert result["router"] == []


@pytest.mark.dist
def test_bytes_and_collectives_of_live_layers(group):
    """On top of the rows: counts and weights of rows one way, and the gradient of the weights the other way."""
    ranks, _ = group
    local = EXPERTS // ranks
    live = [case for case in MATRIX + OTHERS if case.router in LIVE and not case.recompute]
    for case, rank, result in found(group, live):
        parts = min(case.chunks, case.tokens)
        counts = (ranks - 1) * parts * (ranks + EXPERTS + 1) * 8  # and one of tokens
        weights = result["wire_rows"] * (local + 1) * 8
        assert result["forward"] == (2 + 2 * parts, result["bytes"] + counts + weights)
        back = result["back"] * local * 8
        assert result["total"] == (3 + 4 * parts, 2 * result["bytes"] + counts + weights + back), rank
        assert (result["router"] == []) == (case.router == "frozen")


@pytest.mark.dist
def test_bf16_on_the_wire(group):
    for case, rank, result in found(group, BF16):
        # 2^-9 for each trip, and units of the experts that rounding moves across the edge of their ReLU
        assert 1e-4 < result["errors"]["y"] < 1e-2, (case, rank)
        assert 1e-4 < result["errors"]["x"] < 4e-2, (case, rank)


@pytest.mark.dist
def test_weights_may_lie_elsewhere_between_forward_and_backward(group):
    assert all(answer["without_weights"] == [0.0] * 4 for answer in group[1])


@pytest.mark.dist
def test_a_live_plan_is_the_planned_one(group):
    assert all(answer["live_equals_planned"] == 2 * 72 for answer in group[1])


@pytest.mark.dist
def test_unequal_tokens_are_refused_and_a_weight_of_zero_is_a_choice(group):
    ranks, answers = group
    assert [answer["unequal"] for answer in answers] == [3 * ranks] + [0] * (ranks - 1)


def test_the_comparison_sees_a_difference():
    """Negative control: one weight of one expert, and the place that a token's dropout comes from."""
    case = Case("frozen", dropout=0.3, tokens=5)
    want, *_ = truth(case, 2)
    layer = make_layer(case)
    layer.experts.w1.data[0, 0, 0] += 1e-6
    _, _, x, cotangent = problem(case, 2)
    assert isinstance(layer.exchange, Local)
    for token_T, changed in ((numbers(x), 1e-10), (torch.arange(10), 1e-2)):
        got, *_ = run(layer, case, x, cotangent, None, token_T)
        assert (got["experts.w2"] - want["experts.w2"]).norm() / want["experts.w2"].norm() > changed
