"""DynMoE (Guo et al. 2024, arXiv 2405.14297): a gate that lets each token have any number of experts, none too, and
that adds and removes experts while it trains.

It replaces the choice of k and of the number of experts. The score of expert e is sigmoid(cos(x, w_e)); a token has the
experts whose score is above sigmoid(g_e), each with weight 1 / their number. The sign has no gradient, so that of the
sum passes straight through it to score and threshold. A token without an expert gets nothing in training, and its best
expert at evaluation. The loss, times moe.balance_loss, is the sum of the published four: the directions w of the active
experts are to be orthonormal (Frobenius norm of W W^T - 1) and short (mean norm), experts even in load, and few. It is
that of a rank's micro-batch.

Every moe.options.interval steps experts that no token chose become inactive, and if a token had none, one inactive
expert becomes active: its direction is the mean direction of these tokens, its threshold 0. moe.experts is the largest
number; inactive experts are masked, so nothing changes its size. k is not used.

The example shows sums of tokens over all ranks (`summed`), and how a router sets a weight of its own: a parameter
belongs to the optimizer, so an offset beside it takes up the difference. A module inside the router holds the
parameters, so that the loss finds them in ZeRO-3, too.

Letters: T tokens, D width, E experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import option
from foreroute.engine.errors import require
from foreroute.engine.routing.live_router import LiveRoute, LiveRouter, masked_route
from foreroute.engine.routing.method_options import Card, read_options


@dataclass
class Options:
    """The method's own options."""

    start: int = option(0, "Active experts at the start; 0 for all.", at_least=0)
    interval: int = option(0, "Steps after which experts are added and removed; 0 for never.", at_least=0)


class Gate(nn.Module):
    """Directions and thresholds, with the offsets by which the router moved them."""

    direction_offset: Tensor
    threshold_offset: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(nn.init.orthogonal_(torch.empty(experts, width)))
        self.threshold = nn.Parameter(torch.zeros(experts))
        self.register_buffer("direction_offset", torch.zeros(experts, width))
        self.register_buffer("threshold_offset", torch.zeros(experts))

    def forward(self, set_E: Tensor, set_D: Tensor) -> tuple[Tensor, Tensor]:
        """Return directions [E, D] and thresholds [E], fp32 at least.

        Args:
            set_E: bool: whose direction becomes set_D and threshold 0 before.
        """
        wide = torch.promote_types(self.direction.dtype, torch.float32)
        direction_ED, threshold_E = self.direction.to(wide), self.threshold.to(wide)
        with torch.no_grad():
            moved_ED = torch.where(set_E[:, None], set_D - direction_ED, self.direction_offset)
            self.direction_offset.copy_(moved_ED)
            self.threshold_offset.copy_(torch.where(set_E, -threshold_E, self.threshold_offset))
        return direction_ED + self.direction_offset, threshold_E + self.threshold_offset


class TopAnyRouter(LiveRouter):
    """The gate of one layer."""

    card = Card(
        "all experts whose score is above their own learned threshold, weights 1 / their number",
        "DynMoE, arXiv 2405.14297",
        "as learned, and a sum of hidden states over all ranks after each step",
        "runs in which neither k nor the number of experts is known",
    )
    uses = ("options", "balance_loss")
    summed = ("step_missed_D",)
    active_E: Tensor
    set_E: Tensor
    set_D: Tensor
    steps: Tensor
    used_E: Tensor
    missed_D: Tensor
    step_missed_D: Tensor

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        super().__init__(width, moe, layer)
        options = read_options(moe, Options)
        require(
            options.start <= moe.experts,
            f"moe.options.start={options.start}: must be at most moe.experts={moe.experts}, the largest number",
        )
        self.interval, self.loss_weight = options.interval, moe.balance_loss
        self.gate = Gate(width, moe.experts)
        self.register_buffer("active_E", torch.arange(moe.experts) < (options.start or moe.experts))
        self.register_buffer("set_E", torch.zeros(moe.experts, dtype=torch.bool))  # of the next forward pass
        self.register_buffer("set_D", torch.zeros(width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("used_E", torch.zeros(moe.experts))  # since experts were added or removed
        self.register_buffer("missed_D", torch.zeros(width))  # sum of the tokens without an expert, as long
        self.register_buffer("step_missed_D", torch.zeros(width), persistent=False)

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D] to the experts that they are near enough to."""
        direction_ED, threshold_E = self.gate(self.set_E, self.set_D)
        self.set_E.fill_(False)
        with torch.autocast(x_TD.device.type, enabled=False):
            unit_TD = F.normalize(x_TD.to(direction_ED.dtype), dim=1)
            score_TE = (unit_TD @ F.normalize(direction_ED, dim=1).T).sigmoid()
        score_TE = score_TE.masked_fill(~self.active_E, 0.0)  # below all thresholds
        over_TE = score_TE - threshold_E.sigmoid()
        chosen_TE = over_TE.detach() > 0
        none_T1 = ~chosen_TE.any(dim=1, keepdim=True)
        weight_TE = torch.ones_like(over_TE)
        if self.training:
            self.step_missed_D += (x_TD.detach() * none_T1).sum(dim=0)
            weight_TE = straight_through(over_TE)
        else:
            best_T1 = score_TE.argmax(dim=1, keepdim=True)
            chosen_TE = chosen_TE | torch.zeros_like(chosen_TE).scatter(1, best_T1, none_T1)
        number_T1 = chosen_TE.sum(dim=1, keepdim=True).clamp(min=1)
        return masked_route(chosen_TE, weight_TE / number_T1, over_TE)

    def loss(self, live: LiveRoute, count_E: Tensor) -> Tensor:
        """Return the sum of the four losses."""
        over_TE = live.logits_TE
        chosen_TE = over_TE.detach() > 0
        sign_TE = straight_through(over_TE).masked_fill(~chosen_TE, 0.0)
        some_T1 = chosen_TE.any(dim=1, keepdim=True)
        tokens, experts = some_T1.sum().clamp(min=1), over_TE.shape[1]
        share_TE = sign_TE / sign_TE.sum(dim=1, keepdim=True).masked_fill(~some_T1, 1.0)
        load = experts * (share_TE.sum(dim=0) / tokens * chosen_TE.sum(dim=0) / tokens).sum()
        direction_ED, _ = self.gate(self.set_E, self.set_D)
        return self.loss_weight * (load + sign_TE.mean() + diverse_and_short(direction_ED, self.active_E))

    def after_step(self, count_E: Tensor) -> None:
        """Remove the experts that no token chose and add one for the tokens without an expert, if it is time."""
        self.steps += 1
        self.used_E += count_E
        self.missed_D += self.step_missed_D
        self.step_missed_D.zero_()
        if self.interval == 0:
            return
        due = self.steps % self.interval == 0
        left_E = self.active_E & (self.used_E > 0)
        free_E = ~left_E & ((~left_E).cumsum(dim=0) == 1)  # the first inactive one
        new_E = free_E & (self.missed_D.norm() > 0) & due
        self.active_E.copy_(torch.where(due, left_E | new_E, self.active_E))
        self.set_E.copy_(new_E)
        self.set_D.copy_(F.normalize(self.missed_D, dim=0))
        self.used_E.masked_fill_(due, 0.0)
        self.missed_D.masked_fill_(due, 0.0)


def straight_through(over_TE: Tensor) -> Tensor:
    """Return 1, with the gradient of over_TE."""
    return 1.0 + over_TE - over_TE.detach()


def diverse_and_short(direction_ED: Tensor, active_E: Tensor) -> Tensor:
    """Return the Frobenius norm of W W^T - 1 over the active experts' unit directions plus the mean length of all."""
    unit_ED = F.normalize(direction_ED, dim=1)
    apart_EE = unit_ED @ unit_ED.T - torch.eye(len(unit_ED), dtype=unit_ED.dtype, device=unit_ED.device)
    apart_EE = apart_EE.masked_fill(~(active_E[:, None] & active_E), 0.0)
    loss: Tensor = apart_EE.norm() + direction_ED.norm(dim=1).mean()
    return loss
