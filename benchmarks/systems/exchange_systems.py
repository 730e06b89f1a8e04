"""The same layers with the same routing in several systems, for benchmarks/bench_exchange.py.

    ours     engine/moe/layer.py with the exchange `tokens`: each row once to each rank, one row back
    parts    the same in 4 parts: while experts compute one, the rows of others travel
    live     the same, but the plan is made in the forward pass, as of a router that reads hidden states: an exchange of
             counts that the host waits for, and one of the rows' weights
    moe      DeepSpeed 0.19.8's MOELayer (deepspeed/moe/sharded_moe.py) without drops
    autoep   DeepSpeed 0.19.8's AutoEPMoELayer (deepspeed/module_inject/auto_ep_layer.py)

The last two are DeepSpeed's own classes and run their own forward; what they are given is a gate that hands out the
fixed routing at no cost, and experts with biases and ReLU. MOELayer's gate still agrees on a capacity among the ranks
in every layer, as DeepSpeed does without drops. A model is x = x + layer(x), layer by layer.

Letters: T tokens, D width, E experts, L experts on this rank, K active experts, P ranks, N expert rows.
"""

from collections.abc import Sequence
from typing import Any

import deepspeed.comm as deepspeed_comm
import deepspeed.ops
import torch
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.experts import Experts as DeepSpeedExperts
from deepspeed.moe.sharded_moe import MOELayer as DeepSpeedLayer
from torch import Tensor, nn
from torch import distributed as dist

from benchmarks.harness import GradCase
from benchmarks.systems.exchange_problem import Problem
from benchmarks.systems.peers import ExpertModule, separate
from foreroute.engine.config import KernelsConfig, MoEConfig, ParallelConfig
from foreroute.engine.moe.exchange import Exchange, build_exchange
from foreroute.engine.moe.layer import LayerOutput, MoELayer
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.routing.plan import Plan, Route, Routing
from foreroute.engine.routing.plans.live_plan import build_live_plan
from foreroute.kernels import ExpertWeights

NAMES = "w1", "b1", "w2", "b2"
PARTS = {"ours": 1, "parts": 4}


def start_deepspeed() -> None:
    """Let DeepSpeed's collectives use the process group that there is."""
    # Its only use is inference; DeepSpeed would compile it, for a minute, at its first start on a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed_comm.init_distributed("gloo", verbose=False)


def systems(problem: Problem, rank: int, names: Sequence[str]) -> dict[str, GradCase]:
    """Make the model of some systems, each with parameters of its own; a call runs forward and backward."""
    weights = problem.weights(rank)
    routes = [layer[rank] for layer in problem.routes]
    found = {}
    for name in names:
        layers: list[Any]
        if name == "live":
            layers = [_Live(problem, *pair) for pair in zip(weights, routes, strict=True)]
        elif name in PARTS:
            plans = problem.plans(rank, PARTS[name])
            layers = [_Ours(problem, *pair) for pair in zip(weights, plans, strict=True)]
        else:
            kind = {"moe": _MoE, "autoep": _AutoEP}[name]
            layers = [kind(problem, *pair) for pair in zip(weights, routes, strict=True)]
        found[name] = _case(problem, rank, layers)
    return found


def _case(problem: Problem, rank: int, layers: Sequence[Any]) -> GradCase:
    """Make the model of some layers; the modules of their experts have parameters in the order of NAMES."""
    x_TD = problem.x(rank).requires_grad_()

    def forward() -> Tensor:
        out_TD = x_TD
        for layer in layers:
            out_TD = out_TD + layer(out_TD)
        return out_TD

    modules = [module for layer in layers for module in layer.modules_of_experts()]
    pieces = zip(*(list(module.parameters()) for module in modules), strict=True)
    parameters = dict(zip(NAMES, pieces, strict=True))
    return GradCase(forward, x_TD, parameters, problem.x(rank + 1000))


class _Ours:
    """Our layer with its plan."""

    def __init__(self, problem: Problem, weights: ExpertWeights, plan: Plan) -> None:
        shape = problem.shape
        moe = MoEConfig(experts=shape.experts, expert_width=shape.hidden)
        self.layer = MoELayer(shape.width, moe, KernelsConfig(), layer=0)
        for name, value in zip(NAMES, weights, strict=False):  # relu: no w3
            assert value is not None
            setattr(self.layer.experts, name, nn.Parameter(value))
        self.layer.connect(build_exchange(ExpertGroupComm(dist.group.WORLD), ParallelConfig()))
        self.routing = Routing(shape.k, (plan,))

    def __call__(self, x_TD: Tensor) -> Tensor:
        output: LayerOutput = self.layer(x_TD, self.routing)
        return output.y_TD

    def modules_of_experts(self) -> list[nn.Module]:
        return [self.layer.experts]


class _Live(_Ours):
    """Our layer, whose plan is made of a route in each forward pass; choosing costs nothing."""

    def __init__(self, problem: Problem, weights: ExpertWeights, route: Route) -> None:
        super().__init__(problem, weights, problem.plans(dist.get_rank())[0])
        self.route, self.experts = route, problem.shape.experts

    def __call__(self, x_TD: Tensor) -> Tensor:
        assert isinstance(self.layer.exchange, Exchange)
        plan = build_live_plan(self.route, self.experts, self.layer.exchange.comm)
        output: LayerOutput = self.layer(x_TD, Routing(self.routing.k, (plan,)))
        return output.y_TD


class _MoE(DeepSpeedLayer):  # type: ignore[misc]
    """MOELayer whose gate gives (loss, capacity, E, experts, places, weights, counts) of the fixed route."""

    def __init__(self, problem: Problem, weights: ExpertWeights, route: Route) -> None:
        modules = [ExpertModule(expert) for expert in separate(weights)]
        experts = DeepSpeedExperts(nn.Identity(), 0, "all")
        experts.deepspeed_experts, experts.num_local_experts = nn.ModuleList(modules), len(modules)
        num_experts = problem.shape.experts
        super().__init__(self.hand_out, experts, "all", problem.ranks, len(modules))
        self.ep_group = dist.group.WORLD
        chosen_TE = torch.zeros(problem.shape.tokens, num_experts).long()
        chosen_TE.scatter_(1, route.expert_TK, 1)
        place_TK = (chosen_TE.cumsum(0) - 1).gather(1, route.expert_TK)
        self.count_E = chosen_TE.sum(0)
        routes = route.expert_TK.int(), place_TK.int(), route.weight_TK
        self.given = torch.zeros(()), num_experts, *(route_TK.T.contiguous() for route_TK in routes)

    def hand_out(self, *_: Any) -> tuple[Any, ...]:
        """Stand in for the gate."""
        capacity = self.count_E.max()
        deepspeed_comm.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.ep_group)
        loss, *routes_KT = self.given
        return loss, capacity, *routes_KT, self.count_E

    def forward(self, x_TD: Tensor) -> Tensor:
        out_TD: Tensor = super().forward(x_TD, None)
        return out_TD

    def modules_of_experts(self) -> list[nn.Module]:
        return list(self.experts.deepspeed_experts)


class _GroupedExperts(nn.Module):
    """Experts as AutoEP's layer calls them: rows expert by expert, then padding that nobody reads."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__()
        self.w1, self.b1, self.w2, self.b2 = (nn.Parameter(w.clone()) for w in weights[:4] if w is not None)

    def forward(self, x_ND: Tensor, count_L: Tensor) -> Tensor:
        offset_L = count_L.cumsum(0, dtype=torch.int32)
        rows = int(offset_L[-1])
        expert_N = torch.repeat_interleave(count_L.long())
        z_NF = F.grouped_mm(x_ND[:rows], self.w1.mT, offs=offset_L) + self.b1.index_select(0, expert_N)
        y_ND = F.grouped_mm(z_NF.relu(), self.w2, offs=offset_L) + self.b2.index_select(0, expert_N)
        return torch.vstack((y_ND, y_ND.new_zeros(x_ND.shape[0] - rows, x_ND.shape[1])))


class _AutoEP(AutoEPMoELayer):  # type: ignore[misc]
    """AutoEP's layer without its constructor, which wants a Hugging Face model to replace."""

    def __init__(self, problem: Problem, weights: ExpertWeights, route: Route) -> None:
        nn.Module.__init__(self)
        experts = problem.shape.experts
        given = {
            "num_experts": experts,
            "num_local_experts": problem.local,
            "ep_size": problem.ranks,
            "ep_group": dist.group.WORLD,
            "top_k": problem.shape.k,
            "score_apply": "post",
            "combine_impl": "weighted_sum",
            "row_weighting_impl": "eager",
            "comm_backend": "comm",
            "async_split_plan": False,
            "_async_split_plan_pending": None,
            "expert_bias": None,
            "folding_group_handles": None,
            "moe_output_shape": "batched",
            "shared_experts": None,
            "shared_experts_gate": None,
            "return_router_logits": False,
            "tokens_per_expert": torch.zeros(experts),
        }
        for name, value in given.items():
            setattr(self, name, value)
        count_E = torch.bincount(route.expert_TK.flatten(), minlength=experts).int()
        self.router = lambda *_: (route.weight_TK, route.expert_TK, count_E)
        self.experts = _GroupedExperts(weights)

    def forward(self, x_TD: Tensor) -> Tensor:
        out_TD: Tensor = super().forward(x_TD[None])[0]
        return out_TD

    def modules_of_experts(self) -> list[nn.Module]:
        return [self.experts]
