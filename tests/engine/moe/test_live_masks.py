"""Live routers with any number of experts for a token, on 2 and 4 gloo ranks against one process, in fp64.

Tokens without an expert, ranks without one, a whole group without one; weights that are negative or 0; and every router
in engine/routing/live/.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from foreroute.engine.config import MoEConfig, ParallelConfig
from foreroute.engine.config.enums import ExchangeKind
from foreroute.engine.moe import kept_plans
from foreroute.engine.moe.exchange import build_exchange
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.routing.live_router import LiveRouter, gate_logits, masked_route
from foreroute.engine.routing.plan import Routing
from foreroute.engine.testing.live_layers import live_layer
from foreroute.engine.testing.ranks import run_ranks

EXPERTS, WIDTH, HIDDEN, TOKENS = 8, 6, 7, 16
NOBODY = -100.0  # of x: the token chooses no expert


class Masks(LiveRouter):
    """Takes the experts with large logits, weighted by the logits less 1: negative for some, 0 for expert 3."""

    def __init__(self, width, moe, layer=0):
        super().__init__(width, moe, layer)
        self.gate_weight = torch.nn.Parameter(torch.zeros(moe.experts, width))

    def forward(self, x_TD, k, carried=None):
        logits_TE = gate_logits(x_TD, self.gate_weight)
        weight_TE = (logits_TE - 1) * (torch.arange(self.experts) != 3)
        chosen_TE = (logits_TE > 0) & (x_TD[:, :1] != NOBODY)
        return masked_route(chosen_TE, weight_TE, logits_TE)


class Case(NamedTuple):
    router: str  # "masks", or one that comes with the program
    k: int = 2
    moe: tuple[tuple[str, object], ...] = ()
    empty: str = "tokens"  # who chooses nothing: some tokens, a rank, all
    exchange: ExchangeKind = ExchangeKind.tokens
    chunks: int = 1
    recompute: bool = False
    local: bool = False  # the choice depends on the rank's other tokens


WAYS = [*itertools.product((ExchangeKind.tokens, ExchangeKind.gather), (1, 3))]
MASKS = [
    Case("masks", empty=empty, exchange=exchange, chunks=chunks, recompute=recompute)
    for empty in ("tokens", "rank", "all")
    for exchange, chunks in WAYS
    for recompute in (False, True)
]
ROUTERS = [
    Case("frozen"),
    Case("learned"),
    Case("sigmoid_bias", moe=(("options", {"groups": 4, "group_limit": 2, "scale": 2.5}),)),
    Case("dynamic_top_p", moe=(("options", {"threshold": 0.8, "entropy_loss": 0.4}),)),
    Case("expert_choice", local=True),
    Case("base", k=1, local=True),
    Case("adamoe", moe=(("null_experts", 5),)),
    Case("moe_plus_plus", moe=(("constant_experts", 2), ("copy_experts", 1), ("null_experts", 1))),
]
CASES = MASKS + [
    case._replace(exchange=exchange, chunks=chunks, recompute=chunks > 1)
    for case in ROUTERS
    for exchange, chunks in WAYS
]


def make_layer(case):
    router = "learned" if case.router == "masks" else case.router
    moe = MoEConfig(router=router, experts=EXPERTS, expert_width=HIDDEN, balance_loss=0.5, z_loss=0.1, **dict(case.moe))
    layer = live_layer(WIDTH, moe)
    if case.router == "masks":
        layer.router = Masks(WIDTH, moe).double()
        layer.router.gate_weight.data = torch.randn(EXPERTS, WIDTH, dtype=torch.float64)
    if case.router == "sigmoid_bias":
        layer.router.bias.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    return layer


def problem(case, ranks):
    """Input and cotangent of the whole group."""
    torch.manual_seed(5)
    x_TD, cotangent_TD = torch.randn(2, ranks * TOKENS, WIDTH, dtype=torch.float64)
    if case.empty == "all":
        x_TD[:, 0] = NOBODY
    elif case.empty == "rank":
        x_TD[TOKENS : 2 * TOKENS, 0] = NOBODY
    x_TD[::5, 0] = NOBODY if case.router == "masks" else 0.3
    return x_TD, cotangent_TD


def run(layer, case, x_TD, cotangent_TD, *, parts=1):
    """Output, loss, counts and gradients; `parts` ranks add up to the whole."""
    x_TD = x_TD.clone().requires_grad_()
    call = Routing(case.k, None)
    if case.recompute:
        out = checkpoint(layer, x_TD, call, use_reentrant=False, context_fn=kept_plans.contexts)
    else:
        out = layer(x_TD, call)
    loss = torch.zeros(()) if out.auxiliary_loss is None else out.auxiliary_loss
    sent = None if layer.exchange.comm is None else layer.exchange.comm.collectives
    ((out.y_TD * cotangent_TD).sum() + loss / parts).backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": out.y_TD.detach(), "x": x_TD.grad, "loss": loss.detach() / parts, **gradients}, out.count_E, sent


def truth(case, ranks):
    """One process with all experts: with all tokens at once, or rank by rank where a choice is a rank's own."""
    x_TD, cotangent_TD = problem(case, ranks)
    layer, case = make_layer(case), case._replace(recompute=False)
    if not case.local:
        return run(layer, case, x_TD, cotangent_TD)
    pairs = zip(x_TD.split(TOKENS), cotangent_TD.split(TOKENS), strict=True)
    found = [run(layer, case, *pair) for pair in pairs]  # gradients of parameters add up
    joined = {name: torch.cat([one[name] for one, *_ in found]) for name in "yx"}
    return {**found[-1][0], **joined}, sum(count_E for _, count_E, _ in found), None


def one_case(case, rank, ranks):
    """Largest errors, and the collectives of the forward pass."""
    x_TD, cotangent_TD = problem(case, ranks)
    here = slice(rank * TOKENS, (rank + 1) * TOKENS)
    local = range(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    layer = make_layer(case)
    layer.keep_experts(local)
    comm = ExpertGroupComm(dist.group.WORLD)
    parallel = ParallelConfig(expert_ranks=ranks, exchange=case.exchange, chunks=case.chunks)
    layer.connect(build_exchange(comm, parallel), balance_comm=ExpertGroupComm(dist.group.WORLD))
    got, count_E, sent = run(layer, case, x_TD[here], cotangent_TD[here], parts=ranks)
    want, want_E, _ = truth(case, ranks)
    assert torch.equal(count_E, want_E), (case, count_E, want_E)
    errors = {}
    for name, value in got.items():
        expected = want[name]
        if "experts." in name and "zero" not in name:
            expected = expected[local.start : local.stop]
        elif name in "yx":
            expected = expected[here]
        else:
            dist.all_reduce(value)  # as data parallelism does
        errors[name] = (value - expected).abs().max().item()
    return errors, sent


def everything(rank, ranks):
    return [one_case(case, rank, ranks) for case in CASES]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def group(request):
    """(ranks, what each rank found)."""
    return request.param, run_ranks(everything, request.param, request.param)


@pytest.mark.dist
def test_ranks_equal_one_process(group):
    """Forward and every gradient; fp64, so only the order in which sums are added up differs."""
    ranks, answers = group
    for rank in range(ranks):
        for case, (errors, _) in zip(CASES, answers[rank], strict=True):
            assert {"y", "x", "loss", "experts.w1", "experts.b1", "experts.w2", "experts.b2"} <= set(errors)
            for name, error in errors.items():
                assert error < 1e-10, (case, rank, name, error)


@pytest.mark.dist
def test_counts_that_are_known_by_construction_are_not_exchanged(group):
    """Two collectives of rows for each chunk, one of weights, and one of counts where they are not known."""
    ranks, answers = group
    for rank in range(ranks):
        for case, (_, sent) in zip(CASES, answers[rank], strict=True):
            gather = case.exchange is ExchangeKind.gather
            known = case.chunks == 1 and (case.router == "base" or (case.router == "expert_choice" and gather))
            assert sent == 2 * case.chunks + 1 + (not known), (case, rank)


def test_the_cases_are_what_they_say():
    """Tokens with no expert and with several, ranks with none; weights of all signs; the truth is not all zero."""
    for empty in ("tokens", "rank", "all"):
        case = Case("masks", empty=empty)
        x_TD, _ = problem(case, 2)
        route = make_layer(case).router(x_TD, 2).route
        count_T = route.used_TK.sum(dim=1)
        assert (count_T == 0).any() and (empty == "all") == (count_T.max() == 0)
        assert (count_T[TOKENS:].max() == 0) == (empty != "tokens")
        if empty != "all":
            weights = route.weight_TK[route.used_TK]
            assert count_T.max() > 2 and weights.min() < 0 < weights.max() and (weights == 0).any()
        want, count_E, _ = truth(case, 2)
        assert (want["y"].abs().max() > 0) == (count_E.sum() > 0) == (empty != "all")


def test_a_changed_weight_is_seen():
    """The control: errors are those of a comparison that can fail."""
    case = Case("masks")
    x_TD, cotangent_TD = problem(case, 2)
    layer = make_layer(case)
    want, *_ = run(layer, case, x_TD, cotangent_TD)
    layer.router.gate_weight.data[0] *= 1 + 1e-6
    got, *_ = run(layer, case, x_TD, cotangent_TD)
    assert (got["y"] - want["y"]).abs().max() > 1e-10


@pytest.mark.parametrize("case", [case for case in ROUTERS if not case.local], ids=lambda case: case.router)
def test_padding_has_no_part_in_it(case):
    """Rows, losses and counts are those of the layer on the other tokens alone."""
    layer = make_layer(case)
    x_TD, _ = problem(case, 1)
    real_T = torch.arange(TOKENS) % 3 != 1
    got, want = layer(x_TD, Routing(case.k, real_T=real_T)), layer(x_TD[real_T], Routing(case.k))
    torch.testing.assert_close(got.y_TD[real_T], want.y_TD, rtol=1e-12, atol=1e-14)
    assert not got.y_TD[~real_T].any() and torch.equal(got.count_E, want.count_E)
    assert (want.auxiliary_loss is None) == (case.router in ("frozen", "sigmoid_bias"))
    if want.auxiliary_loss is not None:
        torch.testing.assert_close(got.auxiliary_loss, want.auxiliary_loss)
