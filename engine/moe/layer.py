"""The Mixture-of-Experts layer: dispatch -> experts -> combine, driven by a Plan.

    one chunk       x_TD -> dispatch -> [ experts ] -> combine -> y_TD
    several chunks  x_TD -> [ dispatch -> experts -> combine, chunk by chunk ] -> y_TD

The brackets are the call of the module `experts`. ZeRO-3 gathers the weights once around this call, so a plan of
several chunks runs all three steps inside it. A planned router's Plan comes with the batch. A live router routes here,
inside the forward pass, and builds the same kind of Plan; the rest of the layer is equal for both. No code below this
file makes a routing decision.

With moe.weights=live the gate's weights of the received rows come between dispatch and experts (engine/moe/gate.py).

Letters: T local tokens, D width, R received rows, E experts.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foreroute.engine.config import KernelsConfig, MoEConfig
from foreroute.engine.moe.exchange import Exchange, Local
from foreroute.engine.moe.experts import Experts
from foreroute.engine.moe.feed_forward import FeedForward
from foreroute.engine.moe.gate import LiveGate
from foreroute.engine.moe.kept_plans import once
from foreroute.engine.moe.zero_experts import zero_experts
from foreroute.engine.parallel.collectives import ExpertGroupComm, all_reduce_sum
from foreroute.engine.routing.live_router import LiveRouter, of_real, without_padding
from foreroute.engine.routing.methods import expert_slices, has_live_gate, live_method
from foreroute.engine.routing.plan import Plan, Routing
from foreroute.engine.routing.plans.exchange_choice import wire_dtype
from foreroute.engine.routing.plans.live_plan import plan_live
from foreroute.engine.tracing import span, traced
from foreroute.kernels import Dropout, keep_mask, row_hash, unit_hash


class LayerOutput(NamedTuple):
    """Result of a layer."""

    y_TD: Tensor
    auxiliary_loss: Tensor | None  # fp32 scalar, already weighted; None for routers without a loss
    count_E: Tensor  # int64: expert rows of each expert over the expert group
    carried: Tensor | None  # of a live router, for that of the next expert layer


def share_routers(model: nn.Module) -> None:
    """Let live routers take what all layers share from the first of their class, once the model is built."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    routers = [layer.router for layer in layers if layer.router is not None]
    first: dict[type[LiveRouter], LiveRouter] = {}
    for router in routers:
        if (owner := first.setdefault(type(router), router)) is not router:
            router.share(owner)


def update_routers(model: nn.Module, count_LE: Tensor) -> None:
    """Let live routers change their own state after an optimizer step.

    Args:
        count_LE: expert rows of each layer's experts in the step, over all ranks and micro-batches; as many as the
            layer with the most has.
    """
    for module in model.modules():
        if isinstance(module, MoELayer) and (router := module.router) is not None:
            for name in router.summed:
                buffer = router.get_buffer(name)
                buffer.copy_(all_reduce_sum(buffer))
            router.after_step(count_LE[module.layer, : module.num_experts])


class MoELayer(nn.Module):
    """The expert layer of one block."""

    router: LiveRouter | None
    gate: LiveGate | None
    shared: FeedForward | None
    coefficient: nn.Linear | None

    def __init__(
        self,
        width: int,
        moe: MoEConfig,
        kernels: KernelsConfig,
        layer: int,
        *,
        plan: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        """Build the layer with all experts.

        Args:
            width: width of the hidden states (D).
            moe: the section as it is for this layer (MoEConfig.at_layer).
            layer: number of the layer among the model's expert layers.
            plan: number of its router among the planned ones; None: that of the layer.
            dropout: rate on the hidden units of the experts and the shared expert in training.
        """
        super().__init__()
        self.layer, self.plan, self.dropout = layer, layer if plan is None else plan, dropout
        self.num_experts = moe.experts  # of all ranks
        method = live_method(moe)
        self.router = None if method is None else method(width, moe, layer)
        self.gate = LiveGate(width, moe) if has_live_gate(moe) else None
        self.experts = Experts(width, moe, kernels, expert_slices(moe))
        self.zero_experts = zero_experts(width, moe)
        self.exchange: Exchange | Local = Local()
        self.balance_comm: ExpertGroupComm | None = None  # None: a learned router is balanced over this rank's tokens
        self.first_expert = 0  # global number of the first expert on this rank
        self.shared = None
        if moe.shared_width:
            self.shared = FeedForward(width, moe.shared_width, moe.activation, dropout=0.0)
        self.coefficient = nn.Linear(width, 2) if moe.residual else None

    def connect(self, exchange: Exchange | Local | None = None, *, balance_comm: ExpertGroupComm | None = None) -> None:
        """Connect the layer to other ranks; None changes nothing.

        Args:
            exchange: sends token rows to the ranks of their experts and returns the results.
            balance_comm: the ranks over whose tokens a learned router is balanced.
        """
        self.exchange = exchange or self.exchange
        self.balance_comm = balance_comm or self.balance_comm

    def keep_experts(self, experts: range) -> None:
        """Keep these experts and drop the others, which other ranks hold."""
        self.experts.keep(experts)
        self.first_expert = experts.start

    def forward(
        self, x_TD: Tensor, routing: Routing, carried: Tensor | None = None, seen_TD: Tensor | None = None
    ) -> LayerOutput:
        """Apply the layer to the tokens x_TD.

        Args:
            carried: of the live router of the expert layer before.
            seen_TD: read by a live router in place of x_TD, of the same shape and format.

        Raises:
            ValueError: a planned router's plan is missing, or is for another k or another number of tokens.
        """
        plan, auxiliary_loss, carried = self._plan(x_TD if seen_TD is None else seen_TD, routing, carried)
        dropout = self._dropout(x_TD, routing)
        if len(plan.chunks) == 1:
            received_RD = self.exchange.dispatch(x_TD, plan)
            weight_N = None if self.gate is None else self.gate(received_RD, plan.chunks[0].sets)
            partial_RD = self.experts(received_RD, plan, dropout, weight_N=weight_N)
            y_TD = self.exchange.combine(partial_RD, plan)
        else:  # the same, chunk by chunk, in the one call around which ZeRO-3 gathers the weights
            y_TD = self.experts(x_TD, plan, dropout, exchange=self.exchange, gate=self.gate)
        if self.zero_experts is not None:
            y_TD = y_TD + self.zero_experts(x_TD, self._column_weights(x_TD, plan))
        if self.shared is not None:
            y_TD = self._with_shared(y_TD, x_TD, self._shared(self.shared, x_TD, plan, dropout))
        return LayerOutput(y_TD, auxiliary_loss, plan.count_E, carried)

    def _plan(
        self, x_TD: Tensor, routing: Routing, carried: Tensor | None
    ) -> tuple[Plan, Tensor | None, Tensor | None]:
        if self.router is None:
            plan = routing.plan_of(self.plan)
            if plan is None or plan.k != routing.k:
                found = "no plan" if plan is None else f"a plan for k={plan.k}"
                raise ValueError(f"layer {self.layer} has a planned router, k={routing.k}, and got {found}")
            return plan, None, None
        router = self.router
        return once(lambda: self._plan_live(router, x_TD, routing, carried))

    def _plan_live(
        self, router: LiveRouter, x_TD: Tensor, routing: Routing, carried: Tensor | None
    ) -> tuple[Plan, Tensor | None, Tensor | None]:
        live = seen = router(x_TD, routing.k, carried)  # `seen` by counts and losses
        if routing.real_T is not None:
            seen, live = of_real(live, routing.real_T), without_padding(live, routing.real_T)
        with span("plan"):
            plan = plan_live(live.route, router.experts, x_TD, routing.k, self.exchange.comm, self.exchange.parallel)
        if live.column_weight_TJ is not None:
            plan = replace(plan, column_weight_TJ=live.column_weight_TJ)
        if not router.balances:
            return plan, router.loss(seen, plan.count_E), live.carried
        count_X = router.counts(seen)
        if self.balance_comm is not None:
            count_X = self.balance_comm.all_reduce(count_X)
        return plan, router.loss(seen, count_X), live.carried

    def _column_weights(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Return the weights of the tokens' experts that need no row [T, J]."""
        if self.gate is None or plan.own_sets is None:
            assert plan.column_weight_TJ is not None, "a plan with weights of experts that need no row"
            return plan.column_weight_TJ
        if self.exchange.parallel is not None:
            x_TD = x_TD.to(wire_dtype(self.exchange.parallel, x_TD.dtype)).to(x_TD.dtype)
        weight_TJ: Tensor = self.gate(x_TD, plan.own_sets)
        return weight_TJ

    def _with_shared(self, y_TD: Tensor, x_TD: Tensor, shared_TD: Tensor) -> Tensor:
        """Add the shared expert: c0 y + c1 shared with c = softmax(W x + b) if moe.residual (DeepSpeed-MoE's
        PR-MoE, arXiv 2201.05596), else the plain sum."""
        if self.coefficient is None:
            return y_TD + shared_TD
        c_T2 = self.coefficient(x_TD).softmax(dim=-1)
        mixed_TD: Tensor = y_TD * c_T2[:, :1] + shared_TD * c_T2[:, 1:]
        return mixed_TD

    def _shared(self, shared: FeedForward, x_TD: Tensor, plan: Plan, dropout: Dropout | None) -> Tensor:
        """Apply the shared expert; its dropout mask is that of an expert numbered after all others."""
        if dropout is None:
            y_TD: Tensor = traced("shared_expert", shared, x_TD)
            return y_TD
        tokens, num_experts = x_TD.shape[0], plan.count_E.numel()
        ranks = dropout.token_R.numel() // tokens  # ranks of the expert group
        own = self.first_expert * ranks // num_experts
        token_T = dropout.token_R[own * tokens : (own + 1) * tokens]
        row_T = row_hash(replace(dropout, first_expert=0), token_T, num_experts)
        keep_TF = keep_mask(row_T, unit_hash(shared.w2.in_features, x_TD.device), dropout.threshold)
        y_TD = traced("shared_expert", shared, x_TD, keep_TF, dropout.scale)
        return y_TD

    def _dropout(self, x_TD: Tensor, routing: Routing) -> Dropout | None:
        if not self.training or self.dropout == 0.0:
            return None
        token_T = routing.token_T
        if token_T is None:
            token_T = torch.arange(x_TD.shape[0], device=x_TD.device)
        return Dropout(self.dropout, routing.seed_of(self.layer), token_T, self.first_expert)
