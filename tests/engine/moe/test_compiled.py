"""One traced graph for all plans: no graph break, one compilation, and the bits of the eager layer."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from foreroute.engine.config import KernelsConfig, ModelConfig, MoEConfig, ParallelConfig, RouteWeights
from foreroute.engine.config.enums import ExchangeKind
from foreroute.engine.model.attention import SharedAttention
from foreroute.engine.model.block import Block
from foreroute.engine.moe.exchange import build_exchange
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.routing.plan import Routing, layer_seeds
from foreroute.engine.routing.plans.padding import RowBounds, pad_plan
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.routers import hashed, plan_of

EXPERTS, SYMBOLS, WIDTH, K = 8, 9, 12, 2
STREAMS, SEGMENT, STEPS = 2, 10, 200
TOKENS = STREAMS * SEGMENT
MOE = MoEConfig(experts=EXPERTS, expert_width=16, ngram=2, rows=32)
KERNELS = KernelsConfig(masked_from_k=EXPERTS + 1)


@functools.cache
def make_table():
    text = np.random.default_rng(0).integers(0, SYMBOLS, 900).astype(np.uint8)
    return build_tables(MOE, SYMBOLS, text, num_tables=1, seed=1, cache_dir=None)[0]


def routing(step, *, k=K, rank=0, ranks=1, bounds=None, gather=False, weights=RouteWeights.table):
    router = hashed(make_table(), rank=rank, ranks=ranks, weights=weights)
    ids = torch.randint(0, SYMBOLS, (ranks, STREAMS, SEGMENT), generator=torch.Generator().manual_seed(step))
    plan = plan_of(router, ids, ids[..., :1], k, gather=gather)
    if bounds is not None:
        plan = pad_plan(plan, bounds)
    return Routing(k, (plan,), torch.arange(ranks * TOKENS), layer_seeds(step, 1))


def compiled(module):
    """The module traced whole, and what counts its compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(module, fullgraph=True, backend=counter), counter


def results(call, leaves, *inputs):
    y = call(*inputs)[0]
    return y, *torch.autograd.grad((y * y.detach().cos()).sum(), leaves)


def differ(module, traced, leaves, inputs_of, steps=STEPS):
    """Steps in which the traced module gives other bits than the eager one."""
    return [
        step
        for step in range(steps)
        for inputs in [inputs_of(step)]
        if not all(map(torch.equal, results(traced, leaves, *inputs), results(module, leaves, *inputs)))
    ]


@pytest.mark.parametrize("weights", [RouteWeights.table, pytest.param(RouteWeights.live, marks=pytest.mark.slow)])
def test_a_layer_is_compiled_once_for_each_k(weights):
    torch.manual_seed(0)
    layer = MoELayer(WIDTH, replace(MOE, weights=weights), KERNELS, 0, dropout=0.2)
    planned = functools.partial(routing, weights=weights)
    traced, counter = compiled(layer)
    x_TD = torch.randn(TOKENS, WIDTH, requires_grad=True)
    leaves = [x_TD, *layer.parameters()]
    assert differ(layer, traced, leaves, lambda step: (x_TD, planned(step))) == []
    assert counter.frame_count == 1 and not counters["graph_break"]
    for k in (1, 3, 1, 3):
        assert differ(layer, traced, leaves, lambda step, k=k: (x_TD, planned(step, k=k)), steps=3) == []
    assert counter.frame_count <= 3
    # other routes give other outputs: what was compared is not one plan kept in the graph
    assert not torch.equal(traced(x_TD, planned(0)).y_TD, traced(x_TD, planned(1)).y_TD)


@pytest.mark.slow
def test_a_block_is_compiled_once():
    torch.manual_seed(0)
    model = ModelConfig(layers=1, width=WIDTH, heads=2, head_width=6, dropout=0.0, attention_dropout=0.0)
    block = Block(model, MOE, KERNELS, 0)
    traced, counter = compiled(block)
    shared = SharedAttention(torch.randn(2 * SEGMENT, WIDTH), torch.randn(2, 6), torch.randn(2, 6), None)
    x_BQD = torch.randn(STREAMS, SEGMENT, WIDTH, requires_grad=True)
    memory_BMD = torch.randn(STREAMS, SEGMENT, WIDTH)
    leaves = [x_BQD, *block.parameters()]
    assert differ(block, traced, leaves, lambda step: (x_BQD, memory_BMD, shared, routing(step))) == []
    assert counter.frame_count == 1 and not counters["graph_break"]


def on_ranks(rank, ranks, gather):
    """Steps that differ, and compilations, of padded plans; and compilations of plans as they are."""
    torch.manual_seed(0)
    layer = MoELayer(WIDTH, MOE, KERNELS, 0, dropout=0.2)
    local = EXPERTS // ranks
    layer.keep_experts(range(rank * local, (rank + 1) * local))
    kind = ExchangeKind.gather if gather else ExchangeKind.tokens
    layer.connect(build_exchange(ExpertGroupComm(None), ParallelConfig(expert_ranks=ranks, exchange=kind)))
    x_TD = torch.randn(TOKENS, WIDTH, requires_grad=True)
    leaves, bounds = [x_TD, *layer.parameters()], RowBounds(TOKENS, local * ranks * TOKENS)

    def of(step, bounds=None):
        return routing(step, rank=rank, ranks=ranks, bounds=bounds, gather=gather)

    traced, counter = compiled(layer)
    other_bits = [
        step
        for step in range(STEPS)
        if not all(
            map(torch.equal, results(traced, leaves, x_TD, of(step, bounds)), results(layer, leaves, x_TD, of(step)))
        )
    ]
    padded, breaks = counter.frame_count, dict(counters["graph_break"])
    traced, counter = compiled(layer)
    for step in range(3):
        traced(x_TD, of(step))
    return other_bits, padded, breaks, counter.frame_count


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("gather", [False, True], ids=["tokens", "gather"])
def test_padded_plans_of_two_ranks_share_one_graph(gather):
    """Outputs and gradients are those of the plans without padding, run eagerly. Negative control: without padding the
    layer is compiled again."""
    for other_bits, padded, breaks, dynamic in run_ranks(on_ranks, 2, 2, gather):
        assert other_bits == [] and padded == 1 and not breaks
        assert dynamic > 1
