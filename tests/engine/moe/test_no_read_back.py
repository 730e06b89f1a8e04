"""A whole planned layer of one rank of four on tensors without data: any value read back to the host would raise.

Collectives are stubs that check shapes. On fake CUDA tensors only the forward pass runs without a GPU: it checks that
everything is on one device.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from foreroute.engine.config import KernelsConfig, MoEConfig, ParallelConfig, RouteWeights
from foreroute.engine.config.enums import Backend
from foreroute.engine.moe.exchange import Exchange
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.routing.plan import Routing, SetRows
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.routers import hashed, plan_of
from foreroute.kernels import ExpertRows

RANKS, RANK, EXPERTS, WIDTH, TOKENS, K = 4, 1, 8, 16, 23, 3


class Stub:
    """Collectives that move nothing, of four ranks; `order` tells what was issued and waited for."""

    def __init__(self):
        self.order = []

    def get_rank(self, group):
        return RANK

    def get_world_size(self, group):
        return RANKS

    def all_to_all_single(self, got, rows, got_splits=None, splits=None, *, group, async_op):
        for tensor, parts in ((got, got_splits), (rows, splits)):
            assert parts is None or (len(parts) == RANKS and sum(parts) == tensor.shape[0])
        assert got.shape[1] == rows.shape[1] and got.dtype == rows.dtype
        return self._issue()

    def all_gather_into_tensor(self, got, rows, *, group, async_op):
        assert got.shape == (RANKS * rows.shape[0], rows.shape[1]) and got.dtype == rows.dtype
        return self._issue()

    def _issue(self):
        number = sum(word == "issue" for word, _ in self.order)
        self.order.append(("issue", number))
        done = torch.futures.Future()
        done.set_result(None)
        wait = lambda _: self.order.append(("wait", number))  # noqa: E731
        return type("Work", (), {"get_future": lambda _: done, "wait": wait})()


def make_plan(*, weights=RouteWeights.table, **options):
    text = np.random.default_rng(0).integers(0, 9, 900).astype(np.uint8)
    moe = MoEConfig(experts=EXPERTS, ngram=2, rows=32)
    table = build_tables(moe, 9, text, num_tables=1, seed=1, cache_dir=None)[0]
    ids = torch.randint(0, 9, (RANKS, 1, TOKENS), generator=torch.Generator().manual_seed(5))
    router = hashed(table, rank=RANK, ranks=RANKS, weights=weights)
    return plan_of(router, ids, ids[..., :1], K, **options)


def without_data(plan, device="cpu"):
    """The plan with tensors of the same shapes; to be called under a fake mode."""

    def like(tensor):
        return None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    def rows_like(rows):
        return None if rows is None else ExpertRows(*map(like, rows.tensors()))

    def sets_like(sets):
        return None if sets is None else SetRows(like(sets.expert_RK), like(sets.used_RK), like(sets.place_N))

    parts = [
        replace(
            chunk,
            rows=rows_like(chunk.rows),
            weight_N=like(chunk.weight_N),
            send=rows_like(chunk.send),
            received_R=like(chunk.received_R),
            sets=sets_like(chunk.sets),
        )
        for chunk in plan.chunks
    ]
    return replace(plan, count_E=like(plan.count_E), chunks=tuple(parts))


def routing(plan, device="cpu"):
    tokens = torch.empty(RANKS * TOKENS, dtype=torch.int64, device=device)
    return Routing(K, (plan,), tokens, torch.empty(1, 2, dtype=torch.int32, device=device))


def make_layer(name="tokens", **kernels):
    """A layer that holds two of eight experts."""
    moe = MoEConfig(experts=EXPERTS, expert_width=32, weights=OPTIONS[name].get("weights", RouteWeights.table))
    layer = MoELayer(WIDTH, moe, KernelsConfig(**kernels), 0, dropout=0.1)
    for name, parameter in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, nn.Parameter(torch.empty(EXPERTS // RANKS, *parameter.shape[1:])))
    layer.first_expert = RANK * EXPERTS // RANKS
    layer.exchange = Exchange(ExpertGroupComm("group", Stub()), ParallelConfig(expert_ranks=RANKS))
    return layer


OPTIONS = {
    "tokens": {},
    "gather": {"gather": True},
    "tokens in parts": {"chunks": 4},
    "gather in parts": {"gather": True, "chunks": 4},
    "live weights": {"weights": RouteWeights.live},
    "live weights in parts": {"weights": RouteWeights.live, "chunks": 4},
}
PLANS = {name: make_plan(**options) for name, options in OPTIONS.items()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("masked_from_k", [1, EXPERTS + 1], ids=["masked", "grouped"])
@pytest.mark.parametrize("name", PLANS)
def test_a_planned_layer_reads_nothing_back(name, masked_from_k, recompute):
    with FakeTensorMode():
        layer = make_layer(name, masked_from_k=masked_from_k)
        x = torch.empty(TOKENS, WIDTH, requires_grad=True)
        call = routing(without_data(PLANS[name]))
        out = checkpoint(layer, x, call, use_reentrant=False) if recompute else layer(x, call)
        assert out.y_TD.shape == x.shape
        out.y_TD.sum().backward()
        assert x.grad.shape == x.shape
        assert all(p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_read_back_is_seen(where):
    """Negative control."""
    with FakeTensorMode():
        layer = make_layer(masked_from_k=EXPERTS + 1)
        exchange = layer.exchange
        name = "to_experts" if where == "forward" else "to_tokens"
        honest = getattr(exchange, name)

        def curious(rows: Tensor, chunk):
            rows.sum().item()
            return honest(rows, chunk)

        x = torch.empty(TOKENS, WIDTH, requires_grad=True)
        call = routing(without_data(PLANS["tokens"]))
        if where == "forward":
            exchange.to_experts = curious
            with pytest.raises(DataDependentOutputException):
                layer(x, call)
            return
        y_TD = layer(x, call).y_TD
        exchange.to_tokens = curious
        with pytest.raises(DataDependentOutputException):
            y_TD.sum().backward()


@pytest.mark.parametrize("name", PLANS)
def test_everything_is_on_the_device(name):
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            layer = make_layer(name, backend=Backend.triton)
            x = torch.empty(TOKENS, WIDTH)
        plan = without_data(PLANS[name], "cuda")
        out = layer(x, routing(plan, "cuda"))
        assert out.y_TD.device.type == out.count_E.device.type == "cuda"
        stray = replace(plan.chunks[0].rows, slot_N=torch.empty_like(plan.chunks[0].rows.slot_N, device="cpu"))
        plan = replace(plan, chunks=(replace(plan.chunks[0], rows=stray), *plan.chunks[1:]))
        with pytest.raises(ValueError, match=r"rows\.slot_N is on cpu: must be on cuda"):
            layer(x, routing(plan, "cuda"))


def test_parts_overlap():
    """A chunk travels before the one in front of it is waited for, in both directions; results are waited for last."""
    plan = make_plan(chunks=3)
    with FakeTensorMode():
        layer = make_layer(masked_from_k=EXPERTS + 1)
        x = torch.empty(TOKENS, WIDTH, requires_grad=True)
        call = routing(without_data(plan))
        y_TD = layer(x, call).y_TD
        stub = layer.exchange.comm._ops
        # 0, 1, 3: parts on their way to experts; 2, 4, 5: their results
        expected = [
            *[("issue", 0), ("issue", 1), ("wait", 0), ("issue", 2)],
            *[("issue", 3), ("wait", 1), ("issue", 4), ("wait", 3), ("issue", 5)],
            *[("wait", 2), ("wait", 4), ("wait", 5)],
        ]
        assert stub.order == expected
        stub.order.clear()
        y_TD.sum().backward()
        assert stub.order == expected
