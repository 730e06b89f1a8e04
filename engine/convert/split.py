"""MoEfication (Zhang et al. 2022, arXiv 2110.01786): the hidden units of the dense feed-forward, cut into experts.

Units whose rows of the first matrix point the same way belong to one slice (engine/convert/clusters.py); of a gated
feed-forward the first matrix is that of the gate, since the gate decides whether a unit is active. Each active expert
counts 1, so all slices together are the dense feed-forward. Its output bias is counted once, whatever slices are
active: it is a parameter beside the experts.

Letters: D width, F hidden width, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.convert.clusters import balanced_clusters
from foreroute.engine.convert.dense import Dense, as_held
from foreroute.engine.convert.start import Converted, Start
from foreroute.engine.errors import require

_EXPERTS = "experts.moe.experts"  # of the expert layer, inside the module around it


class SlicedFeedForward(nn.Module):
    """The experts' sum and the output bias of the dense feed-forward; knows which of its units each slice has."""

    bias: nn.Parameter | None
    order_F: Tensor
    """int64: the dense feed-forward's hidden units in the order of the experts that have them."""

    def __init__(self, dense: Dense, order_F: Tensor) -> None:
        super().__init__()
        self.names, self.turned = dense.names, dense.turned
        self.experts: nn.Module = nn.Identity()  # set later: the expert layer
        bias_D = dense.weights.get("b2")
        self.register_parameter("bias", None if bias_D is None else nn.Parameter(bias_D.clone()))
        self.register_buffer("order_F", order_F)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., D]."""
        y: Tensor = self.experts(x)
        return y if self.bias is None else y + self.bias

    def dense_parameters(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters of the dense feed-forward, under its names.

        Args:
            own: this module's state with all experts, by its names.
        """
        place_F = own["order_F"].argsort()
        weights = {"b2": own["bias"]} if "bias" in own else {}
        for role in self.names.keys() & {"w1", "b1", "w2", "w3"}:
            weights[role] = own[f"{_EXPERTS}.{role}"].flatten(0, 1)[place_F]
        weights |= {"b3": torch.zeros_like(weights["w1"][:, 0])} if "b3" in self.names else {}
        return as_held(weights, self.names, self.turned)


@dataclass(frozen=True)
class Slices(Start):
    """Slices of the feed-forward, all of one width.

    `rounds`: the most rounds of the clustering; 0 leaves units in their order.
    """

    kind = "split"
    sums_to_1 = False
    rounds: int = 20

    def __post_init__(self) -> None:
        require(self.rounds >= 0, f"rounds={self.rounds}: must be at least 0")

    def section(self, moe: MoEConfig, dense: Dense) -> MoEConfig:
        """Return the options with experts of F / E hidden units."""
        require(
            dense.hidden % moe.experts == 0,
            f"moe.experts={moe.experts}: must divide the hidden width {dense.hidden} of the feed-forwards",
        )
        return replace(moe, expert_width=dense.hidden // moe.experts, activation=dense.activation)

    def convert(self, dense: Dense, moe: MoEConfig, module: nn.Module, seed: int) -> Converted:
        """Cluster the hidden units and cut the weights."""
        order_F = self.order_of(dense, moe, seed)
        experts = cut(dense.weights, order_F, moe.experts)
        return Converted(experts, SlicedFeedForward(dense, order_F))

    def order_of(self, dense: Dense, moe: MoEConfig, seed: int) -> Tensor:
        """Return the hidden units, slice by slice, int64 [F]."""
        rows_FD = dense.weights["w1"]
        generator = torch.Generator().manual_seed(seed)
        return balanced_clusters(rows_FD, moe.experts, rounds=self.rounds, generator=generator).to(rows_FD.device)


def cut(weights: Mapping[str, Tensor], order_F: Tensor, experts: int) -> dict[str, Tensor]:
    """Cut the weights of hidden units into those of experts; the output bias is left out.

    Example: units [0, 1, 2, 3] in the order [3, 1, 0, 2] for 2 experts: expert 0 has units 3 and 1.
    """
    of_units = {key: value for key, value in weights.items() if key in ("w1", "b1", "w2", "w3")}
    return {key: value[order_F].unflatten(0, (experts, -1)) for key, value in of_units.items()}
