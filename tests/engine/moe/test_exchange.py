"""The exchange on 2 and 4 gloo ranks against one rank with all tokens and all experts; bytes against plain counting."""

import numpy as np
import pytest
import torch
from torch import distributed as dist

from engine.config import MoEConfig
from engine.moe.exchange import Gather, Local, Tokens
from engine.moe.routers import HashedRouter
from engine.moe.tables import build_tables
from engine.parallel.collectives import Wire
from engine.testing import run_ranks
from kernels import Dropout, ExpertWeights, moe_ffn

EXPERTS, SYMBOLS, WIDTH, HIDDEN, TOKENS = 8, 9, 12, 16, 23
EXCHANGES = {"tokens": Tokens, "gather": Gather}
KS = (1, 3, 8)


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(ranks):
    """Everything about the whole group: the same on every rank."""
    text = np.random.default_rng(0).integers(0, SYMBOLS, 900).astype(np.uint8)
    moe = MoEConfig(experts=EXPERTS, ngram=2, rows=32)
    table = build_tables(moe, SYMBOLS, text, num_tables=1, seed=1, cache_dir=None)[0]
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, SYMBOLS, (ranks, 1, TOKENS), generator=generator)
    left = torch.randint(0, SYMBOLS, (ranks, 1, 1), generator=generator)
    x = normal(ranks * TOKENS, WIDTH, seed=6)
    cotangent = normal(ranks * TOKENS, WIDTH, seed=7)
    matrix = (EXPERTS, HIDDEN, WIDTH)
    shapes = matrix, matrix[:2], matrix, (EXPERTS, WIDTH), matrix
    weights = [normal(*shape, seed=8 + i) for i, shape in enumerate(shapes)]
    return table, ids, left, x, cotangent, weights


def layer(exchange, x, weights, plan, dropout):
    received = exchange.dispatch(x, plan)
    partial = moe_ffn(received, plan.weight_N.to(x.dtype), ExpertWeights(*weights), plan.rows, dropout=dropout)  # fmt: skip
    return exchange.combine(partial, plan)


def with_gradients(exchange, x, cotangent, weights, plan, dropout=None):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
    y = layer(exchange, leaves[0], leaves[1:], plan, dropout)
    forward = exchange.wire.collectives if hasattr(exchange, "wire") else 0
    y.backward(cotangent)
    return [y.detach(), *(leaf.grad for leaf in leaves)], forward


def one_rank(problem_, k, dropout=None):
    table, ids, left, x, cotangent, weights = problem_
    flat = ids.reshape(1, -1, TOKENS), left.reshape(1, -1, 1)
    plan = HashedRouter(table).plan(*flat, k)
    return with_gradients(Local(), x, cotangent, weights, plan, dropout)[0]


def parity(rank, ranks, dtype):
    """Worst relative error to one rank, and the wire's counts, for every exchange and k."""
    whole = problem(ranks)
    table, ids, left, x, cotangent, weights = whole
    local = EXPERTS // ranks
    tokens, experts = (slice(rank * n, (rank + 1) * n) for n in (TOKENS, local))
    router = HashedRouter(table, rank=rank, ranks=ranks)
    found = {}
    for name, kind in EXCHANGES.items():
        for k in KS:
            plan = router.plan(ids, left, k, gather=name == "gather")
            exchange = kind(Wire(dist.group.WORLD), dtype)
            got, forward = with_gradients(
                exchange, x[tokens], cotangent[tokens], [w[experts] for w in weights], plan
            )
            want = one_rank(whole, k)
            want = [want[0][tokens], want[1][tokens], *(w[experts] for w in want[2:])]
            errors = [((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(got, want, strict=True)]  # fmt: skip
            wire = exchange.wire
            found[name, k] = (max(errors), forward, wire.collectives, wire.sent_bytes, plan.wire_rows, plan.recv_splits)  # fmt: skip
    return found


def pairs(whole, ranks, k):
    """Distinct (token, other rank) pairs that need each other, by rank of the token."""
    table, ids, left, *_ = whole
    router = HashedRouter(table)
    counts = []
    for rank in range(ranks):
        chosen = router.route(ids[rank], left[rank], k).expert_TK.tolist()
        homes = [{expert // (EXPERTS // ranks) for expert in row} for row in chosen]
        counts.append(sum(len(home - {rank}) for home in homes))
    return counts


def everything(rank, ranks):
    """All that is asked of one group of processes: starting them takes longer than all cases together."""
    return {
        "same": parity(rank, ranks, None),
        "bf16": parity(rank, ranks, torch.bfloat16),
        "dropped": dropped(rank, ranks),
        "wrong": wrong(rank, ranks),
    }


@pytest.fixture(scope="module", params=[2, 4])
def group(request):
    """(ranks, what each rank found)."""
    return request.param, run_ranks(everything, request.param, request.param)


@pytest.mark.dist
def test_ranks_equal_one_rank(group):
    ranks, answers = group
    whole = problem(ranks)
    row_bytes = WIDTH * 8
    for k in KS:
        needed = pairs(whole, ranks, k)
        for rank, answer in enumerate(answers):
            found = answer["same"]
            for name in EXCHANGES:
                # fp64: only the order in which the ranks' sums are added up differs
                assert found[name, k][0] < 1e-13, (name, k, rank)
                assert found[name, k][1:3] == (2, 4)  # collectives: two forward, two more backward
            *_, sent, wire_rows, received = found["tokens", k]
            assert wire_rows == needed[rank]  # the deduplicated minimum
            back = sum(received) - received[rank]
            assert sent == 2 * (wire_rows + back) * row_bytes  # rows and their gradients
            assert found["gather", k][3] == 4 * (ranks - 1) * TOKENS * row_bytes


@pytest.mark.dist
def test_bf16_on_the_wire(group):
    for rank, answer in enumerate(group[1]):
        for (name, k), (error, _, _, sent, wire_rows, received) in answer["bf16"].items():
            # 2^-9 for each of four trips, and once more where gather adds up in bf16
            assert 1e-4 < error < 2e-2, (name, k)
            back = sum(received) - received[rank]
            if name == "tokens":
                assert sent == 2 * (wire_rows + back) * WIDTH * 2


def dropped(rank, ranks):
    """Masks follow the global token and expert, so ranks with dropout equal one rank with dropout."""
    whole = problem(ranks)
    table, ids, left, x, cotangent, weights = whole
    local = EXPERTS // ranks
    tokens, experts = (slice(rank * n, (rank + 1) * n) for n in (TOKENS, local))
    plan = HashedRouter(table, rank=rank, ranks=ranks).plan(ids, left, 3, gather=True)
    number = torch.arange(ranks * TOKENS)
    mine = Dropout(0.3, 9, number, first_expert=rank * local)
    got, _ = with_gradients(
        Gather(Wire(dist.group.WORLD)), x[tokens], cotangent[tokens], [w[experts] for w in weights], plan, mine
    )  # fmt: skip
    want = one_rank(whole, 3, Dropout(0.3, 9, number))
    return ((got[0] - want[0][tokens]).norm() / want[0].norm()).item()


@pytest.mark.dist
def test_dropout_does_not_depend_on_where_an_expert_lives(group):
    assert max(answer["dropped"] for answer in group[1]) < 1e-13


def wrong(rank, ranks):
    """A plan of another rank: sizes may fit, contents cannot."""
    table, ids, left, x, cotangent, weights = whole = problem(ranks)
    tokens = slice(rank * TOKENS, (rank + 1) * TOKENS)
    local = EXPERTS // ranks
    experts = slice(rank * local, (rank + 1) * local)
    ids = ids.flip(2)  # another order of tokens than x has
    plan = HashedRouter(table, rank=rank, ranks=ranks).plan(ids, left, 3)
    got, _ = with_gradients(Tokens(Wire(dist.group.WORLD)), x[tokens], cotangent[tokens], [w[experts] for w in weights], plan)  # fmt: skip
    return ((got[0] - one_rank(whole, 3)[0][tokens]).norm() / got[0].norm()).item()


@pytest.mark.dist
def test_a_wrong_plan_is_seen(group):
    assert min(answer["wrong"] for answer in group[1]) > 1e-2


def raises(rank):
    if rank == 1:
        raise ValueError("no such expert")
    dist.barrier()


def test_a_rank_that_raises_is_named():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2:.*ValueError: no such expert"):
        run_ranks(raises, 2)


def test_a_plan_for_another_exchange_is_refused():
    table, ids, left, x, *_ = problem(2)
    router = HashedRouter(table, rank=0, ranks=2)
    tokens, gather = router.plan(ids, left, 2), router.plan(ids, left, 2, gather=True)
    wire = type("Wire", (), {"ranks": 2})()
    with pytest.raises(ValueError, match="another exchange than gather"):
        Gather(wire).dispatch(x[:TOKENS], tokens)
    with pytest.raises(ValueError, match="another exchange than tokens"):
        Tokens(wire).dispatch(x[:TOKENS], gather)
    with pytest.raises(ValueError, match="x_TD has 5 rows: the plan is for 23 tokens"):
        Tokens(wire).dispatch(x[:5], tokens)
