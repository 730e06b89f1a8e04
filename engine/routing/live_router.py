"""The protocol of live routers: choices that need hidden states, made inside the forward pass.

A method is one file in engine/routing/live/, or a user's own class, `moe.router=package.module:Class`. It says, for
each token, which experts with which weights. engine/routing/plans/live_plan.py makes the same kind of plan of that
which planned routers have from the loader.

Letters: T tokens, D width, E experts, K experts listed of a token, J experts that need no row.
"""

from collections.abc import Mapping
from enum import Enum
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.routing.losses import chosen_counts
from foreroute.engine.routing.method_options import Card
from foreroute.engine.routing.plan import Route

GATE_STD = 0.02  # SMoE-Dropout's public code, whatever the model's own init_std


class LiveRoute(NamedTuple):
    """A live router's choice; tuples, in which ZeRO-3 finds a module's outputs."""

    route: Route
    logits_TE: Tensor  # fp32 (fp64 for fp64 x), connected to x (and to the gate, if learned): for losses
    carried: Tensor | None = None  # [T, any]: for the router of the next expert layer
    column_weight_TJ: Tensor | None = None  # of experts that need no row (engine/moe/zero_experts.py)


def without_padding(live: LiveRoute, real_T: Tensor) -> LiveRoute:
    """Return a choice in which padding has no expert; the host waits for the number of rows.

    A router that compares tokens has chosen among all of them, padding too.

    Args:
        real_T: bool, false for padding.
    """
    route, column_weight_TJ = live.route, live.column_weight_TJ
    used_TK = real_T[:, None].expand_as(route.expert_TK)
    if route.used_TK is not None:
        used_TK = used_TK & route.used_TK
    if column_weight_TJ is not None:
        column_weight_TJ = column_weight_TJ.masked_fill(~real_T[:, None], 0.0)
    return live._replace(route=Route(route.expert_TK, route.weight_TK, used_TK), column_weight_TJ=column_weight_TJ)


def of_real(live: LiveRoute, real_T: Tensor) -> LiveRoute:
    """Return the choices of the tokens that are no padding alone, for counts and losses; the host waits for their
    number, which must not be 0."""
    route, column_weight_TJ = live.route, live.column_weight_TJ
    used_TK = None if route.used_TK is None else route.used_TK[real_T]
    return LiveRoute(
        Route(route.expert_TK[real_T], route.weight_TK[real_T], used_TK),
        live.logits_TE[real_T],
        live.carried,
        None if column_weight_TJ is None else column_weight_TJ[real_T],
    )


class LiveRouter(nn.Module):
    """A live router of one layer."""

    card: ClassVar[Card]
    uses: ClassVar[tuple[str, ...]] = ()
    """Options of the section `moe` that it reads, besides those of all routers."""
    only_with: ClassVar[Mapping[str, tuple[str, Enum]]] = {}
    """Those of them that it reads only if another option of the section has this value."""
    balances: ClassVar[bool] = False
    """Its loss needs `counts`, over all ranks if moe.balance_over=global."""
    summed: ClassVar[tuple[str, ...]] = ()
    """Names of buffers that are added up over all ranks before `after_step`, such as sums over a rank's tokens."""

    def __init__(self, width: int, moe: MoEConfig, layer: int) -> None:
        """Make the router of expert layer number `layer`; `width` is that of the hidden states (D)."""
        super().__init__()
        self.experts = moe.experts
        self.most = moe.columns  # the largest k that it takes

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states to k experts each, on average.

        Args:
            carried: of the router of the expert layer before.
        """
        raise NotImplementedError

    def counts(self, live: LiveRoute) -> Tensor:
        """Count what the loss of a router that `balances` needs of all ranks' tokens, int64.

        By default the tokens that chose each expert [E].
        """
        return chosen_counts(live.route, self.experts)

    def share(self, first: Self) -> None:
        """Take what all layers share from the first expert layer's router of this class, which owns it.

        Hold a shared module where nn.Module does not see it, as in a tuple, and call it as a module: so it is one
        module of the model, and ZeRO-3 gathers its weights at each call.
        """

    def loss(self, live: LiveRoute, count_E: Tensor) -> Tensor | None:
        """Return the auxiliary loss of a pass, weighted, fp32 scalar.

        Args:
            count_E: `counts`, over all ranks where the router balances globally; of a router that does not balance the
                rows of each expert over the expert group.
        """
        return None

    def after_step(self, count_E: Tensor) -> None:
        """Change the router's own state after an optimizer step.

        Args:
            count_E: expert rows of each expert in the step, over all ranks and micro-batches, fp64 on the device.
        """


def count_all(live: LiveRoute, experts: int) -> Tensor:
    """Count the tokens that chose each expert of any kind, and all tokens, int64 [X + 1]; for `LiveRouter.counts`."""
    count_E = chosen_counts(live.route, experts)
    parts = [count_E, count_E.new_full((1,), len(live.logits_TE))]
    if live.column_weight_TJ is not None:
        parts.insert(1, (live.column_weight_TJ > 0).sum(dim=0))
    return torch.cat(parts)


def gate_weight(width: int, experts: int) -> Tensor:
    """Draw a gate's weights [E, D] from N(0, 0.02^2)."""
    return torch.empty(experts, width).normal_(0.0, GATE_STD)


def gate_logits(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Return x W^T + b in fp32, also for a bf16 model and under autocast; in fp64 for fp64 x.

    A module that was cast to bf16 holds the gate rounded to bf16; the product is of those rounded numbers, but exact to
    fp32, so near-ties are not decided by bf16 sums. It is therefore a slightly different gate than the fp32 one.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(wide), weight_ED.to(wide), None if bias_E is None else bias_E.to(wide))


def top_k_route(logits_TE: Tensor, k: int) -> LiveRoute:
    """Take the k largest logits of each token, largest first; weights are the softmax over these k."""
    top_TK, expert_TK = logits_TE.topk(k, dim=-1, sorted=True)
    return LiveRoute(Route(expert_TK, top_TK.softmax(dim=-1)), logits_TE)


def top_k_mask(logits_TX: Tensor, k: int) -> Tensor:
    """Return which columns the k largest logits of each token are in, bool [T, X]."""
    return torch.zeros_like(logits_TX, dtype=torch.bool).scatter(1, logits_TX.topk(k, dim=1).indices, True)


def masked_route(
    chosen_TE: Tensor, weight_TE: Tensor, logits_TE: Tensor, rows: int | None = None, *, even: bool = False
) -> LiveRoute:
    """Take any number of experts for each token, none too.

    Args:
        chosen_TE: bool.
        weight_TE: what it has where not chosen does not matter.
        rows, even: as in Route, where they are known by construction: the host then need not wait.
    """
    expert_TE = torch.arange(chosen_TE.shape[1], device=chosen_TE.device).expand(chosen_TE.shape)
    return LiveRoute(Route(expert_TE, weight_TE, chosen_TE, rows, even), logits_TE)
