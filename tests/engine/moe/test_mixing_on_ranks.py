"""Learned gates on planned sets, experts without rows and the learned residual, on 1, 2 and 4 ranks, against plain
loops in one process, in fp64; and what they send.

Every case runs in one group of processes per number of ranks.
"""

import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from foreroute.engine.config import KernelsConfig, MoEConfig, ParallelConfig
from foreroute.engine.config.enums import ExchangeKind, WireFormat
from foreroute.engine.moe.exchange import Local, build_exchange
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.plans.planner import Planner
from foreroute.engine.routing.row_sets import Choice, RowSets, softmax_weights
from foreroute.engine.testing.ranks import run_ranks
from tests.references.mixed_layer import layer as reference

EXPERTS, WIDTH, HIDDEN, TOKENS, ROWS, K = 8, 12, 16, 11, 40, 3
KINDS = ExchangeKind.tokens, ExchangeKind.gather
TOKENS_BY_RANKS = {1: 4 * TOKENS, 2: 2 * TOKENS, 4: TOKENS}  # the same text


class Case(NamedTuple):
    gate: str | None = "softmax"  # None: fixed weights
    normalised: bool = True
    scale: float = 1.0
    exchange: ExchangeKind = ExchangeKind.tokens
    chunks: int = 1
    recompute: bool = False
    counts: bool = True  # rows of 0 to K experts, else all of K
    first: int = EXPERTS  # experts that occur: fewer leave ranks without rows
    columns: tuple[int, int, int] = (0, 0, 0)  # constants, copies, nulls
    residual: bool = False
    masked: bool = False


FORMULAS = [("softmax", True, 1.0), ("sigmoid", True, 1.0), ("sigmoid", False, 1.0), ("sqrt_softplus", True, 1.5)]
FORMULAS += [("sqrt_softplus", False, 2.5), ("softmax", True, 0.5), ("softmax", False, 1.5)]
TRIPS = list(itertools.product(KINDS, (1, 3), (False, True)))  # exchange, chunks, recompute
MATRIX = [
    Case(*formula, *trip)
    for number, formula in enumerate(FORMULAS)
    for place, trip in enumerate(TRIPS)
    if place % 2 == number % 2 or number == 3
]
OTHERS = [
    Case("sqrt_softplus", True, 1.5, *trip, **other)
    for number, other in enumerate(({"counts": False}, {"first": 2}, {"first": 1}, {"masked": True}))
    for trip in TRIPS[number % 2 :: 2]  # a rank or three without rows, where few experts occur
]
COLUMNS = [
    Case(gate, True, 1.0, *trip, columns=columns)
    for number, gate in enumerate((None, "softmax", "sigmoid"))
    for place, columns in enumerate(((2, 1, 2), (0, 2, 0), (1, 0, 0), (0, 0, 3)))
    for trip in TRIPS[(number + place) % 4 :: 4]
]
COLUMNS += [Case("softmax", False, 1.0, *trip, columns=(2, 1, 2)) for trip in TRIPS[::4]]
RESIDUAL = [Case(gate, True, 1.0, *trip, residual=True) for gate in (None, "softmax") for trip in TRIPS[::2]]
CASES = MATRIX + OTHERS + COLUMNS + RESIDUAL


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row_sets(case, *, live=True):
    """Rows over the experts that occur and the columns; wherever there are counts the first row has none."""
    generator = torch.Generator().manual_seed(9)
    columns = [*range(case.first), *range(EXPERTS, EXPERTS + sum(case.columns))]
    order = torch.stack([torch.randperm(len(columns), generator=generator) for _ in range(ROWS)])[:, :K]
    count_r = torch.randint(0, order.shape[1] + 1, (ROWS,), generator=generator, dtype=torch.int32)
    count_r[0], count_r[1] = 0, order.shape[1]
    score_rK = torch.randn(order.shape, generator=generator)
    sets = RowSets(torch.tensor(columns, dtype=torch.uint8)[order], None, count_r=count_r if case.counts else None)
    return sets if live and case.gate else sets._replace(weigh=softmax_weights, score_rK=score_rK)


def rows_of(ranks):
    row_T = torch.randint(0, ROWS, (4 * TOKENS,), generator=torch.Generator().manual_seed(5))
    return row_T.view(ranks, -1).numpy()


def make_layer(case):
    moe = MoEConfig(
        experts=EXPERTS,
        expert_width=HIDDEN,
        weights="live" if case.gate else "table",
        gate=case.gate or "softmax",
        gate_normalised=case.normalised,
        gate_scale=case.scale,
        constant_experts=case.columns[0],
        copy_experts=case.columns[1],
        null_experts=case.columns[2],
        shared_width=10 * case.residual,
        residual=case.residual,
    )
    made = MoELayer(WIDTH, moe, KernelsConfig(masked_from_k=1 if case.masked else EXPERTS + 1), 0).double()
    for index, parameter in enumerate(made.parameters()):
        parameter.data = normal(*parameter.shape, seed=20 + index) / 3
    return made


def share(made, case, rank, ranks, wire=WireFormat.model):
    local = EXPERTS // ranks
    made.keep_experts(range(rank * local, (rank + 1) * local))
    parallel = ParallelConfig(expert_ranks=ranks, exchange=case.exchange, chunks=case.chunks, wire=wire)
    made.connect(build_exchange(ExpertGroupComm(dist.group.WORLD), parallel))


def make_plan(case, rank, ranks, *, live=True):
    planner = Planner(EXPERTS, columns=EXPERTS + sum(case.columns), rank=rank, ranks=ranks)
    choice = Choice(rows_of(ranks), row_sets(case, live=live))
    return planner.plan(choice, K, gather=case.exchange is ExchangeKind.gather, chunks=case.chunks)


def text():
    return normal(4 * TOKENS, WIDTH, seed=6), normal(4 * TOKENS, WIDTH, seed=7)


def plain(case):
    """The case without how rows travel, which makes no difference to what comes out."""
    return case._replace(exchange=ExchangeKind.tokens, chunks=1, recompute=False, masked=False)


@functools.cache
def truth(case):
    """Output and gradients by plain loops over all tokens."""
    tensors = {name: p.detach().clone().requires_grad_() for name, p in make_layer(case).named_parameters()}
    x, cotangent = text()
    x.requires_grad_()
    sets = row_sets(case)
    row_T = rows_of(1)[0]
    count_r = torch.full((ROWS,), sets.order_rK.shape[1]) if sets.count_r is None else sets.count_r
    chosen_T = [sets.order_rK[row, : count_r[row]].tolist() for row in row_T]
    fixed_T = None
    if case.gate is None:
        assert sets.score_rK is not None
        fixed_T = [sets.score_rK[row, : count_r[row]].double().softmax(0) for row in row_T]
    y = reference(x, chosen_T, tensors, case.gate, case.normalised, case.scale, case.columns[1], fixed_T)
    (y * cotangent).sum().backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in tensors.items()}
    return {name: value.numpy() for name, value in {"y": y.detach(), "x": x.grad, **grads}.items()}


def run(made, case, x, cotangent, plan):
    x = x.clone().requires_grad_()
    call = Routing(K, (plan,))
    out = checkpoint(made, x, call, use_reentrant=False) if case.recompute else made(x, call)
    (out.y_TD * cotangent).sum().backward()
    return {"y": out.y_TD.detach(), "x": x.grad, **{name: p.grad for name, p in made.named_parameters()}}


def one_case(case, rank, ranks, want):
    """Worst error of each tensor, and what was sent."""
    x, cotangent = text()
    here = slice(rank * TOKENS_BY_RANKS[ranks], (rank + 1) * TOKENS_BY_RANKS[ranks])
    made = make_layer(case)
    if ranks > 1:
        share(made, case, rank, ranks)
    plan = make_plan(case, rank, ranks)
    got, want = run(made, case, x[here], cotangent[here], plan), {n: torch.from_numpy(v) for n, v in want.items()}
    local = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    errors = {}
    for name, value in got.items():
        assert value is not None, (case, name)
        expected = want[name]
        if name.startswith("experts."):
            expected = expected[local]
        elif name in "yx":
            expected = expected[here]
        elif ranks > 1:
            dist.all_reduce(value)  # as data parallelism does
        scale = want[name].norm().clamp(min=1)  # the gate's is 0 for one expert in a normalised set
        errors[name] = ((value - expected).norm() / scale).item()
    comm = made.exchange.comm
    return {
        "errors": errors,
        "sent": None if comm is None else (comm.collectives, comm.sent_bytes),
        "rows": sum(chunk.rows.num_rows for chunk in plan.chunks),
        "wire": (plan.wire_rows, plan.wire_bytes(WIDTH, 8)),
    }


def fixed(case, rank, ranks):
    """What the same layer sends with fixed weights."""
    x, cotangent = text()
    here = slice(rank * TOKENS_BY_RANKS[ranks], (rank + 1) * TOKENS_BY_RANKS[ranks])
    case = case._replace(gate=None)
    made = make_layer(case)
    share(made, case, rank, ranks)
    run(made, case, x[here], cotangent[here], make_plan(case, rank, ranks, live=False))
    comm = made.exchange.comm
    return comm.collectives, comm.sent_bytes


def sums_over_ranks(rank, ranks, *, rounded):
    """Each token's sum of weights over the ranks, rows sent as bf16; fp32 model, columns without rows too."""
    sums = []
    for exchange, columns in itertools.product(KINDS, ((0, 0, 0), (1, 1, 1))):
        case = Case("sigmoid", exchange=exchange, columns=columns, counts=False)
        made = make_layer(case).float()
        share(made, case, rank, ranks, WireFormat.bf16)
        plan, tokens = make_plan(case, rank, ranks), TOKENS_BY_RANKS[ranks]
        x_TD = text()[0][rank * tokens : (rank + 1) * tokens].float()
        (chunk,) = plan.chunks
        received = made.exchange.dispatch(x_TD, plan)
        token_R = torch.arange(ranks * tokens) if chunk.received_R is None else chunk.received_R
        if not rounded:
            own = token_R // tokens == rank
            received = torch.where(own[:, None], x_TD[token_R % tokens], received)
        weight_T = torch.zeros(ranks * tokens)
        weight_T.index_add_(0, token_R[chunk.rows.source_N], made.gate(received, chunk.sets))
        if made.zero_experts is not None:
            column_T = made._column_weights(x_TD, plan).sum(dim=1)
            weight_T[rank * tokens : (rank + 1) * tokens] += column_T
        dist.all_reduce(weight_T)
        sums.append((weight_T - 1).abs().max().item())
    return sums


def everything(rank, ranks, wanted):
    answer = {"cases": [one_case(case, rank, ranks, wanted[plain(case)]) for case in CASES]}
    if ranks > 1:
        answer["fixed"] = [fixed(case, rank, ranks) for case in MATRIX + OTHERS]
        with torch.no_grad():
            answer["sums"] = [sums_over_ranks(rank, ranks, rounded=rounded) for rounded in (True, False)]
    return answer


@functools.cache
def found(ranks):
    """What each rank found."""
    wanted = {case: truth(case) for case in map(plain, CASES)}
    return [everything(0, 1, wanted)] if ranks == 1 else run_ranks(everything, ranks, ranks, wanted)


@pytest.mark.dist
@pytest.mark.method
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_output_and_every_gradient_are_those_of_plain_loops(ranks):
    for rank, answer in enumerate(found(ranks)):
        for case, result in zip(CASES, answer["cases"], strict=True):
            names = {"y", "x", "experts.w1", "experts.b1", "experts.w2", "experts.b2"}
            names |= {"gate.weight"} if case.gate else set()
            names |= {"zero_experts.vector", "zero_experts.mix"} if case.columns[0] else set()
            names |= {"coefficient.weight", "coefficient.bias"} if case.residual else set()
            assert names <= set(result["errors"])
            for name, error in result["errors"].items():
                # fp64; fixed weights of a plan are fp32
                assert error < (1e-12 if case.gate else 1e-6), (ranks, rank, case, name)
        one = [result["rows"] for case, result in zip(CASES, answer["cases"], strict=True) if case.first == 1]
        assert one and all((rows == 0) == (rank > 0) for rows in one)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_gate_sends_no_byte_more_than_fixed_weights(ranks):
    for answer in found(ranks):
        live = [result["sent"] for result in answer["cases"][: len(MATRIX + OTHERS)]]
        assert live == answer["fixed"] and all(count > 0 for count, _ in live)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_without_rows_send_nothing(ranks):
    """Rows and bytes are those of the sets' real experts, counted by plain loops."""
    tokens, local = TOKENS_BY_RANKS[ranks], EXPERTS // ranks
    for case in COLUMNS:
        if case.exchange is ExchangeKind.gather or case.recompute:
            continue
        sets, row_PT = row_sets(case), rows_of(ranks)
        sent, received, rows = [0] * ranks, [0] * ranks, [0] * ranks
        for rank, token in itertools.product(range(ranks), range(tokens)):
            row = row_PT[rank, token]
            experts = [e for e in sets.order_rK[row, : sets.count_r[row]].tolist() if e < EXPERTS]
            for expert in experts:
                rows[expert // local] += 1
            for other in {expert // local for expert in experts} - {rank}:
                sent[rank] += 1
                received[other] += 1
        for rank, answer in enumerate(found(ranks)):
            result = answer["cases"][CASES.index(case)]
            assert result["rows"] == rows[rank]
            assert result["wire"] == (sent[rank], (sent[rank] + received[rank]) * WIDTH * 8)
            assert result["sent"][1] == 2 * result["wire"][1]  # and backward


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_copies_of_a_row_are_rounded_alike(ranks):
    """With rows sent as bf16 a row's weights on all ranks still add up to 1; not so if its own rank did not round."""
    for answer in found(ranks):
        rounded, unrounded = answer["sums"]
        assert max(rounded) < 1e-6 and min(unrounded) > 3e-5


def test_a_changed_gate_is_seen():
    """Negative control."""
    case = Case("sqrt_softplus")
    made = make_layer(case)
    made.gate.weight.data[1, 0] += 1e-6
    got = run(made, case, *text(), make_plan(case, 0, 1))
    assert isinstance(made.exchange, Local) and isinstance(made.gate, nn.Module)
    want = torch.from_numpy(truth(case)["gate.weight"])
    error = (got["gate.weight"] - want).norm() / want.norm()
    assert error > 1e-10
