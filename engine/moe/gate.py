"""Live weights of planned experts: a learned gate over the experts that a plan chose, from the rows that arrived.

DeepSeek-V4's hash layers and the second stage of StableMoE (arXiv 2204.08396): which experts is planned, how much of
each is learned. Each rank that has a row computes the gate of the row's whole set and keeps the weights of its own
experts. The ranks' gradients add up to those of one process: that of the row in the exchange's own way back, that of
the gate as any replicated parameter's. So nothing more travels than with fixed weights. All copies of a row must be
rounded alike, which the exchange does (its own rows go through the same number format).

    logits g = x W^T;  w_i = scale f(g_i) / sum over the set of f(g_j), or scale f(g_i)

For a softmax f(g_i) is exp(g_i) / sum over all columns of exp(g_j): not normalised over the set, the weights are those
of a top-k router that keeps its probabilities as they are (Switch Transformer, OLMoE).

Constants, copies and nulls (engine/moe/zero_experts.py) are columns of the gate too. Their weights are made where the
token is, from the row as the exchange rounds it, so that the weights of a set are of one copy.

Letters: R received rows, T tokens, D width, E experts, J columns without experts, e = E + J columns, K columns listed
of a row, N expert rows of this rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreroute.engine.config import Gate, MoEConfig
from foreroute.engine.routing.live_router import gate_logits, gate_weight
from foreroute.engine.routing.plan import SetRows

_LOWEST = -80.0  # of a logit: below it softplus is 0 in fp32, and the gradient of its root not a number
_EPSILON = 1e-20


class LiveGate(nn.Module):
    """The gate of one layer, replicated on all ranks."""

    def __init__(self, width: int, moe: MoEConfig) -> None:
        super().__init__()
        self.kind, self.normalised, self.scale = moe.gate, moe.gate_normalised, moe.gate_scale
        self.experts = moe.experts
        self.weight = nn.Parameter(gate_weight(width, moe.columns))

    def forward(self, x_RD: Tensor, sets: SetRows) -> Tensor:
        """Return the weights of rows, fp32 at least.

        Args:
            x_RD: the received rows; or the local tokens, rounded as the exchange rounds them.

        Returns:
            The weight of each expert row of this rank [N]. Of local tokens those of all columns without experts [T, J],
            0 where a token does not use one.
        """
        return self.weigh(x_RD, self.weight, sets)

    def weigh(self, x_RD: Tensor, weight_eD: Tensor, sets: SetRows) -> Tensor:
        """Do the same with a weight that is given. Without rows it still has a gradient, of zeros."""
        logits_Re = gate_logits(x_RD, weight_eD)
        if self.kind is Gate.softmax and not self.normalised:
            weight_RK = logits_Re.softmax(dim=1).gather(1, sets.expert_RK)
            weight_RK = weight_RK if sets.used_RK is None else weight_RK.masked_fill(~sets.used_RK, 0.0)
        else:
            logits_RK = logits_Re.gather(1, sets.expert_RK)
            weight_RK = gate_weights(logits_RK, sets.used_RK, self.kind, normalised=self.normalised)
        weight_RK = self.scale * weight_RK
        if sets.place_N is not None:
            return weight_RK.reshape(-1).index_select(0, sets.place_N)
        weight_Te = weight_RK.new_zeros(len(x_RD), len(weight_eD)).scatter_add(1, sets.expert_RK, weight_RK)
        return weight_Te[:, self.experts :]


def gate_weights(logits_RK: Tensor, used_RK: Tensor | None, kind: Gate, *, normalised: bool) -> Tensor:
    """Return the weights of each row's set; 0 for what is not in it, and for a row without experts.

    A softmax over the set is normalised anyway. A normalised weight of a single expert is the constant 1, and teaches
    the gate nothing.

    Args:
        used_RK: which of the experts are in the set; None: all.
    """
    if used_RK is None:
        weight_RK = _activated(logits_RK, kind)
    elif kind is Gate.softmax:
        weight_RK = logits_RK.masked_fill(~used_RK, -torch.inf)
        weight_RK = weight_RK.masked_fill(~used_RK.any(dim=1, keepdim=True), 0.0).softmax(dim=1)
        weight_RK = weight_RK.masked_fill(~used_RK, 0.0)
    else:
        weight_RK = _activated(logits_RK.masked_fill(~used_RK, 0.0), kind).masked_fill(~used_RK, 0.0)
    if normalised and kind is not Gate.softmax:
        weight_RK = weight_RK / (weight_RK.sum(dim=1, keepdim=True) + _EPSILON)
    return weight_RK


def _activated(logits_RK: Tensor, kind: Gate) -> Tensor:
    if kind is Gate.softmax:
        return logits_RK.softmax(dim=1)
    return logits_RK.sigmoid() if kind is Gate.sigmoid else F.softplus(logits_RK.clamp(min=_LOWEST)).sqrt()
