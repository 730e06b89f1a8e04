"""RMoE (Qiu et al. 2024, arXiv 2408.06793): a recurrent router that knows the choices of the layers below.

It replaces the linear gate of each layer. z = P x is the layer's own projection of the token. h = GRU(z, h of the layer
below) is a cell that all layers share; h starts at 0. The logits are W h; of them the top k and their softmax. The
state h goes along the layers, not along the text, so nothing more travels between ranks.

The example shows what travels from layer to layer (`carried`), and what layers share (`share`): the cell belongs to the
router of the first expert layer.

Letters: T tokens, D width, H width of the router, E experts.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import option
from foreroute.engine.routing.live_router import LiveRoute, LiveRouter, gate_logits, gate_weight, top_k_route
from foreroute.engine.routing.losses import balance_loss, z_loss
from foreroute.engine.routing.method_options import Card, read_options


@dataclass
class Options:
    """The method's own options."""

    hidden: int = option(256, "Width of the recurrent state (H); the published default is 256.", at_least=1)


class Cell(nn.GRUCell):
    """A gated recurrent unit in fp32 at least, whatever the model's number format."""

    def forward(self, z_TH: Tensor, h_TH: Tensor | None = None) -> Tensor:
        """Return the next state [T, H]."""
        h_TH = torch.zeros_like(z_TH) if h_TH is None else h_TH
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        with torch.autocast(z_TH.device.type, enabled=False):
            return torch.gru_cell(z_TH, h_TH, *(weight.to(z_TH.dtype) for weight in weights))


class RecurrentRouter(LiveRouter):
    """The router of one layer."""

    card = Card(
        "top k of a linear gate on a recurrent state that goes from layer to layer, softmax over those k",
        "RMoE, arXiv 2408.06793",
        "as learned, and a GRU cell of every token in every layer",
        "gates of deep models that shall build on the layers below",
    )
    uses = ("options", "balance_loss", "balance_over", "z_loss")
    balances = True

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        super().__init__(width, moe, layer)
        hidden = read_options(moe, Options).hidden
        self.project_weight = nn.Parameter(torch.empty(hidden, width).normal_(0.0, width**-0.5))
        self.gate_weight = nn.Parameter(gate_weight(hidden, moe.experts))
        self.cell: Cell | None = Cell(hidden, hidden)
        self._cells: tuple[Cell, ...] = ()  # of the first layer
        self.balance_weight, self.z_weight = moe.balance_loss, moe.z_loss

    def share(self, first: Self) -> None:
        """Use the cell of the first layer."""
        assert first.cell is not None
        self.cell, self._cells = None, (first.cell,)

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D] to k experts each; `carried` is the state [T, H] of the layer below."""
        cell = self._cells[0] if self.cell is None else self.cell
        h_TH: Tensor = cell(gate_logits(x_TD, self.project_weight), carried)
        return top_k_route(gate_logits(h_TH, self.gate_weight), k)._replace(carried=h_TH)

    def loss(self, live: LiveRoute, count_E: Tensor) -> Tensor:
        """Return the balance loss and the z-loss."""
        loss = self.balance_weight * balance_loss(live.logits_TE, count_E)
        return loss + self.z_weight * z_loss(live.logits_TE)
