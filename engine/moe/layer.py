"""The Mixture-of-Experts layer: dispatch -> experts -> combine, driven by a Plan.

    one chunk       x_TD -> dispatch -> [ experts ] -> combine -> y_TD
    several chunks  x_TD -> [ dispatch -> experts -> combine, chunk by chunk ] -> y_TD

The brackets are the call of the module `experts`. ZeRO-3 gathers the weights once around this call, so a plan of
several chunks runs all three steps inside it. A planned router's Plan comes with the batch. A live router routes here,
inside the forward pass, and builds the same kind of Plan; the rest of the layer is equal for both. No code below this
file makes a routing decision.

Letters: T local tokens, D width, R received rows, E experts.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foreroute.engine.config import KernelsConfig, MoEConfig, Router
from foreroute.engine.moe.exchange import Exchange, Local
from foreroute.engine.moe.experts import Experts
from foreroute.engine.moe.feed_forward import FeedForward
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.routing.live_plan import plan_live
from foreroute.engine.routing.losses import balance_loss, chosen_counts, z_loss
from foreroute.engine.routing.plan import Plan, Routing
from foreroute.engine.routing.routers import FrozenRouter, LearnedRouter
from foreroute.engine.tracing import span, traced
from foreroute.kernels import Dropout, keep_mask, row_hash, unit_hash


class LayerOutput(NamedTuple):
    """Result of a layer."""

    y_TD: Tensor
    auxiliary_loss: Tensor | None  # fp32 scalar, already weighted; None unless the router is learned
    count_E: Tensor  # int64: expert rows of each expert over the expert group


class MoELayer(nn.Module):
    """The expert layer of one block."""

    router: FrozenRouter | LearnedRouter | None
    shared: FeedForward | None

    def __init__(self, width: int, moe: MoEConfig, kernels: KernelsConfig, layer: int, *, dropout: float = 0.0) -> None:
        """Build the layer with all experts.

        Args:
            width: width of the hidden states (D).
            layer: number of the layer among the model's expert layers.
            dropout: rate on the hidden units of the experts and the shared expert in training.
        """
        super().__init__()
        self.layer, self.dropout = layer, dropout
        self.balance_weight, self.z_weight = moe.balance_loss, moe.z_loss
        self.router = None
        if moe.router is Router.frozen:
            self.router = FrozenRouter(width, moe.experts)
        elif moe.router is Router.learned:
            self.router = LearnedRouter(width, moe.experts)
        self.experts = Experts(width, moe, kernels)
        self.exchange: Exchange | Local = Local()
        self.balance_comm: ExpertGroupComm | None = None  # None: a learned router is balanced over this rank's tokens
        self.first_expert = 0  # global number of the first expert on this rank
        self.shared = None
        if moe.shared_width:
            self.shared = FeedForward(width, moe.shared_width, moe.activation, dropout=0.0)

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
        for name, parameter in list(self.experts.named_parameters()):
            setattr(self.experts, name, nn.Parameter(parameter.detach()[experts.start : experts.stop].clone()))
        self.first_expert = experts.start

    def forward(self, x_TD: Tensor, routing: Routing) -> LayerOutput:
        """Apply the layer to the tokens x_TD.

        Raises:
            ValueError: a planned router's plan is missing, or is for another k or another number of tokens.
        """
        plan, auxiliary_loss = self._plan(x_TD, routing)
        dropout = self._dropout(x_TD, routing)
        if len(plan.chunks) == 1:
            received_RD = self.exchange.dispatch(x_TD, plan)
            partial_RD = self.experts(received_RD, plan, dropout)
            y_TD = self.exchange.combine(partial_RD, plan)
        else:  # the same, chunk by chunk, in the one call around which ZeRO-3 gathers the weights
            y_TD = self.experts(x_TD, plan, dropout, exchange=self.exchange)
        if self.shared is not None:
            y_TD = y_TD + self._shared(self.shared, x_TD, plan, dropout)
        return LayerOutput(y_TD, auxiliary_loss, plan.count_E)

    def _plan(self, x_TD: Tensor, routing: Routing) -> tuple[Plan, Tensor | None]:
        if self.router is None:
            plan = routing.plan_of(self.layer)
            if plan is None or plan.k != routing.k:
                found = "no plan" if plan is None else f"a plan for k={plan.k}"
                raise ValueError(f"layer {self.layer} has a planned router, k={routing.k}, and got {found}")
            return plan, None
        live = self.router(x_TD, routing.k)
        num_experts = live.logits_TE.shape[1]
        with span("plan"):
            plan = plan_live(live.route, num_experts, x_TD, self.exchange.comm, self.exchange.parallel)
        if isinstance(self.router, FrozenRouter):
            return plan, None
        count_E = chosen_counts(live.route.expert_TK, num_experts)
        if self.balance_comm is not None:
            count_E = self.balance_comm.all_reduce(count_E)
        loss = self.balance_weight * balance_loss(live.logits_TE, count_E)
        return plan, loss + self.z_weight * z_loss(live.logits_TE)

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
